"""`crrelu image`: from a config and from a checkpoint, augmentation, resume, evaluation, and what it refuses."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from pictures import NAMES, VIT, folder, picture, save, vit
from runs import losses, write_rows

from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.training.augmentation import _OPERATIONS, Augmentation
from crrelu_llm.training.run import run_recipe

BASE = {
    "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 2e-3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0, "use_cpu": True, "disable_tqdm": True,
    "activation": "crrelu", "calibration": "none", "epsilon_learning_rate": 0.05,
}  # fmt: skip
ALL = {"crop_padding": 1, "horizontal_flip": True, "randaugment_ops": 2, "mixup_alpha": 0.4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images in `data` and a ViT in `vit`."""
    path = tmp_path_factory.mktemp("image")
    folder(path / "data")
    save(vit(), path / "vit")
    return path


def argv(place, name, **options):
    """The command line of a recipe, from scratch unless it names a model."""
    values = BASE | {"dataset_name": str(place / "data"), "output_dir": str(place / name)} | options
    if "model_name_or_path" not in values:
        values.setdefault("model_config", VIT)
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def run(place, name, **options):
    return run_recipe("image", argv(place, name, **options))


def trainer_of(place, name, **options):
    from crrelu_llm.training.arguments import parse
    from crrelu_llm.training.prepare import datasets_of, starting_checkpoint
    from crrelu_llm.training.trainers import build_trainer

    recipe = parse("image", argv(place, name, **options))
    train, test = datasets_of(recipe, always_test=True)
    source = recipe.kind.start(recipe, train, place / name / "start")
    model = starting_checkpoint(source, recipe.activation.patch_config(), place / name / "patched")
    return recipe, build_trainer(recipe, model, train, test)


def test_from_scratch_epsilon_is_trained_saved_and_loaded_again(place):
    from transformers import AutoModelForImageClassification

    from crrelu_llm.patching.loading import load_processor

    record = run(place, "scratch", max_steps=12, eval_strategy="epoch")
    assert record["kind"] == "image" and record["steps"] == 12 and losses(record)[-1] < losses(record)[0]
    assert all(abs(record["epsilon"][path] - start) > 1e-4 for path, start in record["epsilon_start"].items())
    evaluated = [entry for entry in record["history"] if "eval_loss" in entry]
    assert evaluated and 0 <= evaluated[-1]["eval_accuracy"] <= 1
    model = AutoModelForImageClassification.from_pretrained(place / "scratch")
    assert model.vit.layers[1].mlp.activation_fn.epsilon.item() == pytest.approx(
        record["epsilon"]["vit.layers.1.mlp.activation_fn"], abs=1e-7
    )
    assert list(model.config.id2label.values()) == sorted(NAMES)
    assert load_processor(str(place / "scratch")).size["height"] == 8


def test_without_an_activation_it_is_transformers_to_the_last_digit(place):
    """The model's own loss, in the same order of rows."""
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    from crrelu_llm.training.pictures import Epochs

    ours = run(place, "plain", activation=None, weight_decay=0.1)
    _, trainer = trainer_of(place, "plain-data", activation=None)

    class Plain(Trainer):
        def _get_train_sampler(self, *args):
            return Epochs(24, 0, lambda: 0)

    keys = ("max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "report_to", "use_cpu")
    args = TrainingArguments(str(place / "theirs"), weight_decay=0.1, **{key: BASE[key] for key in keys})
    model = AutoModelForImageClassification.from_pretrained(place / "plain" / "start")
    theirs = Plain(model, args, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator)
    theirs.train()
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert losses(ours) == pytest.approx(expected, abs=1e-7) and len(expected) == 4


@pytest.mark.parametrize("steps", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_resumed_training_is_the_one_that_was_not_stopped(steps, place):
    """In the middle of an epoch (6 batches) and at its end; with everything that is drawn at random."""
    name = f"resumed-{steps}"
    options = ALL | {"max_steps": 8, "save_strategy": "steps", "save_steps": steps, "label_smoothing_factor": 0.1}
    whole = run(place, name, **options)
    for checkpoint in (place / name).glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{steps}":
            shutil.rmtree(checkpoint)
    again = run(place, name, resume_from_checkpoint="auto", **options)
    assert again["resumed"] and losses(again) == losses(whole) and again["epsilon"] == whole["epsilon"]


def test_what_is_drawn_depends_on_the_row_alone(place):
    _, trainer = trainer_of(place, "drawn", **ALL)
    data, rows = trainer.train_dataset, len(trainer.train_dataset)
    first, again, later = data[5], data[5], data[rows + 5]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], later["pixel_values"])
    assert first["labels"].sum() == pytest.approx(1) and first["labels"].shape == (3,)
    orders = [list(trainer._get_train_sampler()) for _ in range(2)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(rows)) and orders[0] != list(range(rows))
    trainer.state.epoch = 1.5
    later_order = list(trainer._get_train_sampler())
    assert {number // rows for number in later_order} == {1}
    assert [number % rows for number in later_order] != orders[0]
    test = trainer.eval_dataset
    assert test[3]["labels"].item() == test.labels[3] and test[3]["pixel_values"].shape == (3, 8, 8)


@pytest.mark.slow
def test_workers_change_nothing(place):
    alone, worked = (run(place, f"workers-{count}", dataloader_num_workers=count, **ALL) for count in (0, 2))
    assert losses(alone) == losses(worked)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", _OPERATIONS)
def test_every_operation_keeps_size_and_mode(name, mode):
    image = picture("striped", 0, 24, mode)
    strong = [_OPERATIONS[name](image, 1.0, sign) for sign in (1, -1)]
    assert all((made.size, made.mode) == (image.size, mode) for made in strong)
    if name == "identity":
        assert strong[0] == image
    elif mode == "RGB":
        assert any(made != image for made in strong)
    if name not in ("autocontrast", "equalize"):
        calm = _OPERATIONS[name](image, 0.0, 1)
        assert np.abs(np.asarray(calm, int) - np.asarray(image, int)).max() <= 1


def test_crops_and_flips_show_a_part():
    image = picture("bright", 0, 8)
    pixels = np.asarray(image)
    crops = [np.asarray(Augmentation(crop_padding=2)(image, np.random.default_rng(i))) for i in range(30)]
    assert {crop.shape for crop in crops} == {(8, 8, 3)}
    assert any((crop == 0).all(axis=(1, 2)).any() for crop in crops)
    flips = [np.asarray(Augmentation(horizontal_flip=True)(image, np.random.default_rng(i))) for i in range(30)]
    mirrored = pixels[:, ::-1]
    assert all((flip == pixels).all() or (flip == mirrored).all() for flip in flips)
    assert 5 < sum(bool((flip == mirrored).all()) for flip in flips) < 25
    image = picture("striped", 0, 24)
    parts = [Augmentation(crop_scale=0.2)(image, np.random.default_rng(i)) for i in range(5)]
    assert all(part.size == (24, 24) and part != image for part in parts)


def test_evaluating_by_image(place):
    recipe, trainer = trainer_of(place, "evaluated")
    metrics, items = recipe.kind.evaluate(trainer)
    model = trainer.model.eval()
    pixels = torch.stack([row["pixel_values"] for row in (trainer.eval_dataset[i] for i in range(9))])
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    labels = torch.tensor(trainer.eval_dataset.labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert items["loss"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert items["accuracy"] == (logits.argmax(-1) == labels).double().tolist()
    assert "top5_accuracy" not in items and metrics["accuracy"] == np.mean(items["accuracy"])
    logged = trainer.evaluate()
    assert logged["eval_loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert logged["eval_accuracy"] == pytest.approx(metrics["accuracy"])
    assert len(recipe.kind.texts(trainer)) == 9


def test_the_first_five():
    from crrelu_llm.evaluation.classified import hits

    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    assert hits(logits, torch.tensor([0, 4, 5])).tolist() == [[True, True], [False, True], [False, False]]


def test_a_checkpoint_with_these_labels_keeps_its_head(place):
    _, trainer = trainer_of(place, "kept", model_name_or_path=str(place / "vit"), activation=None)
    weight = vit().classifier.weight
    assert torch.equal(trainer.model.classifier.weight, weight) and not (place / "kept" / "start").exists()
    # the model's numbers of the labels, which are not the data's
    assert [trainer.model.config.id2label[label] for label in trainer.eval_dataset.labels[:4]] == ["bright"] * 3 + [
        "dark"
    ]


@pytest.mark.slow
def test_the_same_comparison_again_keeps_everything(place):
    test_a_comparison_has_a_report(place)
    kept = {path: path.stat().st_mtime_ns for path in (place / "comparison").rglob("run.json")}
    test_a_comparison_has_a_report(place)
    assert kept == {path: path.stat().st_mtime_ns for path in (place / "comparison").rglob("run.json")} and kept


def test_other_labels_want_a_new_head_which_the_seed_decides(place, tmp_path):
    save(vit(labels=("cat", "dog", "tree")), place / "pets")
    options = {"model_name_or_path": str(place / "pets"), "activation": None}
    with pytest.raises(InputError, match=r"the label bright is not one of .*pets's: cat, dog, tree; set ignore_mism"):
        run(place, "refused", **options)
    options["ignore_mismatched_sizes"] = True
    models = [trainer_of(place, f"new-{seed}", seed=seed, **options)[1].model for seed in (0, 1)]
    same = trainer_of(place, "new-again", seed=0, **options)[1].model
    old = vit()
    assert torch.equal(models[0].vit.layers[0].mlp.fc1.weight, old.vit.layers[0].mlp.fc1.weight)
    assert not torch.equal(models[0].classifier.weight, old.classifier.weight)
    assert not torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    assert torch.equal(models[0].classifier.weight, same.classifier.weight)


def test_a_checkpoint_without_a_head_gets_one(place):
    old = vit()
    old.vit.save_pretrained(place / "headless")
    shutil.copy(place / "vit" / "preprocessor_config.json", place / "headless")
    _, trainer = trainer_of(place, "head", model_name_or_path=str(place / "headless"))
    assert torch.equal(trainer.model.vit.layers[0].mlp.fc1.weight, old.vit.layers[0].mlp.fc1.weight)
    assert trainer.model.classifier.out_features == 3


def test_a_comparison_has_a_report(place):
    recipe = argv(place, "unused", max_steps=3)
    values = {key: value for key, value in yaml.safe_load((place / "unused.yaml").read_text()).items()
              if key not in ("activation", "output_dir", "seed")}  # fmt: skip
    (place / "compared.yaml").write_text(yaml.safe_dump(values))
    out = place / "comparison"
    words = [
        "compare",
        "image",
        "--config",
        str(place / "compared.yaml"),
        "--seeds",
        "0",
        "1",
        "--output_dir",
        str(out),
    ]
    assert recipe and main([*words, "--arms", "gelu", "crrelu"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (
        report["verdict"].startswith("After training, ")
        and report["title"].startswith("vit from scratch")
        and report["items"] == "images"
    )
    units = {(entry["metric"], entry["unit"]) for entry in report["comparisons"] if entry["candidate"] == "crrelu"}
    assert {("accuracy", unit) for unit in ("seed", "item", "both")} <= units
    assert report["headline"]["metric"] == "accuracy" and "top-1 accuracy" in (out / "report.html").read_text()
    assert all(arm["patch"]["sites"] for arm in report["arms"])
    from transformers import AutoModelForImageClassification

    first, second, other = (
        AutoModelForImageClassification.from_pretrained(out / arm / f"seed-{seed}" / "patched").classifier.weight
        for arm, seed in (("gelu", 0), ("crrelu", 0), ("crrelu", 1))
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert {len(arm["runs"]) for arm in report["arms"]} == {2}


def test_calibrated_on_the_images_that_are_trained_on(place):
    record = run(place, "calibrated", model_name_or_path=str(place / "vit"), calibration="fit", calibration_images=24)
    report = json.loads((place / "calibrated" / "patched" / "patch_report.json").read_text())
    assert record["status"] == "done" and report["options"]["calibration_data"] == str(place / "data")
    assert all(site["kept"] == "fit" for site in report["sites"])


def bad_data(path, change):
    folder(path, train=6, test=3)
    change(path)
    return {"dataset_name": str(path)}


def broken_first(path):
    (path / "train" / "dark" / "0.png").write_bytes(b"\x89PNG no image")


def broken(path):
    (path / "train" / "dark" / "1.png").write_bytes(b"\x89PNG no image")


def sixteen_bits(path):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path / "train" / "dark" / "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (broken_first, "dark/0.png: cannot be read as an image"),
        (broken, "dark/1.png: cannot be read as an image"),
        (sixteen_bits, "dark/1.png: an image of mode I;16; give 8 bits per channel"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(change, words, place, tmp_path):
    with pytest.raises(InputError) as caught:
        run(place, "bad", **bad_data(tmp_path / "bad", change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column_name": "picture"}, "image needs a column of images"),
        ({"label_column_name": "kind"}, "image needs a column of images"),
        ({"model_config": None}, "or model_config, for a model from scratch"),
        ({"model_config": {"hidden_size": 16}}, "model_config has no model_type; name a family"),
        ({"model_config": VIT | {"model_type": "gpt2"}}, "gpt2 is a language model, not an image classifier"),
        ({"model_config": VIT | {"patch_size": 0}}, "no model can be built"),
        ({"model_config": "nowhere.json"}, "nowhere.json"),
        ({"model_config": {"model_type": "imagegpt"}}, "imagegpt takes input_ids, not pixels"),
        ({"model_name_or_path": "builtin:nano", "model_config": None}, "gpt2 is a language model, not an image"),
        ({"model_name_or_path": "builtin:nano", "model_config": VIT}, "give one of them"),
        ({"randaugment_magnitude": 11}, "randaugment_magnitude must be from 0 to 10, not 11"),
        ({"crop_scale": 2}, "crop_scale must be a share from 0 to 1, not 2"),
        ({"mixup_alpha": -1}, "mixup_alpha must be 0 or more, not -1"),
        ({"use_peft": True}, "use_peft is for language models"),
        ({"dataset_streaming": True}, "images are not read as a stream"),
        ({"image_size": 16}, "row 1: Input image size (16*16) doesn't match model"),
        ({"horizontal_flipp": True}, "did you mean 'horizontal_flip'?"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_input_is_one_line(options, words, place, capsys):
    assert main(["image", *argv(place, "wrong", **options)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("crrelu image: ") and words in said
    shutil.rmtree(place / "wrong", ignore_errors=True)


def test_labels_that_training_did_not_have(place, tmp_path):
    from datasets import Dataset, DatasetDict, Image

    def rows(labels):
        made = Dataset.from_dict({"image": [picture("bright", i) for i in range(len(labels))], "label": labels})
        return made.cast_column("image", Image())

    DatasetDict(train=rows(["a", "b", "a", "b"]), test=rows(["a", "c"])).save_to_disk(tmp_path / "data")
    with pytest.raises(InputError, match=r"row 2 has the label c, which is none of the model's: a, b"):
        run(place, "labels", dataset_name=str(tmp_path / "data"), eval_strategy="epoch")
    DatasetDict(train=rows([0, 1, -1, 1]), test=rows([0, 1])).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(InputError, match=r"row 3 has no label"):
        run(place, "unlabelled", dataset_name=str(tmp_path / "unlabelled"))


def test_images_are_not_for_sft_nor_texts_for_image(place, tmp_path):
    from crrelu_llm.training.arguments import parse
    from crrelu_llm.training.preflight import check_model

    recipe = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(place / "vit"), "use_cpu": True}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | {"dataset_name": str(place / "data")}))
    with pytest.raises(InputError, match="crrelu image takes these"):
        run_recipe("sft", ["--config", str(tmp_path / "sft.yaml")])
    with pytest.raises(InputError, match="is an image classifier, without a head that predicts tokens"):
        check_model(parse("sft", ["--config", str(tmp_path / "sft.yaml")]))
    with pytest.raises(InputError, match="image needs a column of images"):
        run(place, "texts", dataset_name=write_rows(tmp_path / "texts.jsonl", [{"text": "a"}]))


def test_images_of_other_sizes_and_modes_become_the_models(place, tmp_path):
    folder(tmp_path / "data", train=6, test=3)
    for size, mode, number in ((12, "L", 1), (30, "RGBA", 4), (8, "P", 7), (9, "CMYK", 10)):
        made = picture("dark", number, size, "RGB").convert(mode)
        made.save(tmp_path / "data" / "train" / "dark" / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    record = run(place, "sizes", dataset_name=str(tmp_path / "data"), max_steps=2)
    grey = VIT | {"num_channels": 1}
    thin = run(place, "grey", dataset_name=str(tmp_path / "data"), max_steps=2, model_config=grey, **ALL)
    assert record["status"] == thin["status"] == "done"
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(place / "grey")
    assert model.vit.embeddings.patch_embeddings.projection.weight.shape[1] == 1


_TNT = {"model_type": "timm_wrapper", "architecture": "tnt_s_patch16_224"}


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_model_of_timm_says_what_to_install(place):
    with pytest.raises(InputError, match=r"a timm model needs timm and the torchvision that matches .*pip install"):
        run(place, "timm", model_config=_TNT)


@pytest.mark.slow
def test_tnt_is_trained(place):
    pytest.importorskip("timm", reason="an optional extra, which needs torchvision")
    record = run(place, "tnt", model_config=_TNT, image_size=224, max_steps=1)
    assert record["status"] == "done" and len(record["epsilon"]) == 24
