"""Full fine-tuning through the recipes: what is trained, saved and logged, and that TRL's own options keep working."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LORA, losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, SFTTrainer

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig, section
from crrelu_llm.patching.transform import patch_checkpoint, read_report
from crrelu_llm.training.arguments import parse
from crrelu_llm.training.prepare import datasets_of
from crrelu_llm.training.run import train_and_save

SITES = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
IDS = torch.arange(6, 30).view(2, 12)
LN2 = math.log(2)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("kind", "per"),
    [
        ("sft", "layer"),
        ("dpo", "channel"),
        pytest.param("sft", "channel", marks=pytest.mark.slow),
        pytest.param("dpo", "layer", marks=pytest.mark.slow),
    ],
)
def test_epsilon_is_trained_saved_and_logged(workshop, kind, per):
    recipe, trainer = workshop.trainer(kind, "run", epsilon_per=per)
    record = train_and_save(trainer, recipe)
    output = workshop.folder / "run"
    assert sorted(record["epsilon"]) == SITES
    assert record["epsilon_start"] == pytest.approx(dict.fromkeys(SITES, 0.01), abs=1e-8)
    assert all(abs(record["epsilon"][site] - 0.01) > 1e-6 for site in SITES)
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    assert {type(reloaded.get_submodule(site)) for site in SITES} == {CRReLU}
    assert torch.equal(logits(reloaded), logits(trainer.model))
    steps = [entry for entry in record["history"] if "loss" in entry]
    assert len(steps) == 3
    assert [entry["epsilon/" + SITES[0]] for entry in steps][-1] == pytest.approx(record["epsilon"][SITES[0]])
    assert steps[-1]["epsilon_mean"] == pytest.approx(np.mean(list(record["epsilon"].values())))
    assert record == json.loads((output / "run.json").read_text())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("sft", {}, id="sft-full"),
        pytest.param("dpo", LORA, id="dpo-lora"),
        pytest.param("sft", {"gradient_checkpointing": True}, id="sft-checkpointing"),
        pytest.param("sft", LORA, id="sft-lora", marks=pytest.mark.slow),
        pytest.param("dpo", {}, id="dpo-full", marks=pytest.mark.slow),
        pytest.param("dpo", {"gradient_checkpointing": True}, id="dpo-checkpointing", marks=pytest.mark.slow),
    ],
)
def test_recompute_changes_no_bit_of_a_run(workshop, kind, options):
    found = [workshop.run(kind, name, recompute_activation=name == "with", **options) for name in ("without", "with")]
    without, with_ = (load_saved(workshop.folder / name) for name in ("without", "with"))
    assert losses(found[0]) == losses(found[1])
    assert without.keys() == with_.keys()
    assert all(torch.equal(without[name], with_[name]) for name in without)
    config = json.loads((workshop.folder / "with" / "patched" / "config.json").read_text())
    assert config["crrelu"]["recompute_activation"] is True


def load_saved(folder):
    return load_file(next(folder.glob("*model.safetensors")))


def test_recompute_in_a_compiled_model_is_refused(workshop):
    with pytest.raises(InputError, match="recompute_activation has no effect in a compiled model"):
        workshop.run("sft", "run", recompute_activation=True, torch_compile=True)


def test_recompute_of_a_checkpoint_that_was_patched_before(workshop, tmp_path):
    patch_checkpoint(workshop.model, PatchConfig(calibration="none"), tmp_path / "patched")
    _, trainer = workshop.trainer(
        "sft", "run", model_name_or_path=str(tmp_path / "patched"), recompute_activation=True
    )
    assert all(layer.mlp.recomputes for layer in trainer.model.transformer.h)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(layer.mlp.recomputes for layer in again.transformer.h)


def test_run_json(workshop):
    record = workshop.run("sft", "run", seed=7, eval_strategy="steps", eval_steps=3)
    assert record["kind"] == "sft"
    assert record["activation"] == "crrelu"
    assert (record["seed"], record["status"], record["steps"]) == (7, "done", 3)
    assert record["metrics"]["train_loss"] == pytest.approx(np.mean(losses(record)))
    assert record["train_seconds"] > 0
    assert record["tokens_per_second"] == pytest.approx(record["history"][-2]["num_tokens"] / record["train_seconds"])
    assert record["peak_memory_bytes"] > 1e7
    assert record["recipe"] == workshop.values("sft", "run", seed=7, eval_strategy="steps", eval_steps=3)
    assert record["environment"]["processes"] == 1
    assert {"torch", "transformers", "trl"} <= set(record["environment"]["versions"])
    assert "eval_loss" in record["history"][-1]
    assert record == json.loads((workshop.folder / "run" / "run.json").read_text())


def test_an_already_patched_checkpoint_is_taken_as_it_is(workshop):
    patched = workshop.folder / "ready"
    patch_checkpoint(workshop.model, PatchConfig(epsilon_init=0.25, calibration="none"), patched)
    record = workshop.run("sft", "run", model_name_or_path=str(patched))
    assert record["epsilon_start"] == dict.fromkeys(SITES, 0.25)
    assert not (workshop.folder / "run" / "patched").exists()
    plain = workshop.run("sft", "plain", model_name_or_path=str(patched), activation=None)
    assert losses(plain) == losses(record)
    with pytest.raises(InputError, match="already patched to crrelu"):
        workshop.run("sft", "other", model_name_or_path=str(patched), activation="gelu")


def test_another_activation(workshop):
    record = workshop.run("sft", "gelu", activation="gelu")
    assert (record["activation"], record["epsilon"]) == ("gelu", {})
    assert not any(key.startswith("epsilon") for entry in record["history"] for key in entry)
    reloaded = AutoModelForCausalLM.from_pretrained(workshop.folder / "gelu")
    assert section.read(reloaded.config)["activation"] == "gelu"
    assert losses(record) != losses(workshop.run("sft", "crrelu"))


def test_calibration_sets_the_start(workshop, text_file):
    options = {"calibration": "fit", "calibration_data": str(text_file), "calibration_tokens": 2048}
    record = workshop.run("sft", "run", **options)
    fitted = {site["path"]: site["epsilon_mean"] for site in read_report(workshop.folder / "run" / "patched")["sites"]}
    assert record["epsilon_start"] == fitted
    assert all(abs(start - 0.01) > 0.01 for start in fitted.values())


@pytest.mark.parametrize(("kind", "theirs"), [("sft", SFTTrainer), ("dpo", DPOTrainer)])
def test_without_an_activation_it_is_trl(workshop, kind, theirs):
    ours = workshop.run(kind, "ours", activation=None)
    recipe = parse(kind, workshop.argv(kind, "theirs", activation=None))
    train, _ = datasets_of(recipe)
    trainer = theirs(model=workshop.model, args=recipe.training, train_dataset=train)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses(ours)
    assert ours["activation"] == "native"
    saved = AutoModelForCausalLM.from_pretrained(workshop.folder / "ours")
    assert section.read(saved.config) is None
    assert torch.equal(logits(saved), logits(trainer.model))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_gradient_checkpointing_changes_nothing(workshop, kind):
    plain, saving = (workshop.run(kind, f"{on}", gradient_checkpointing=on) for on in (False, True))
    np.testing.assert_allclose(losses(saving), losses(plain), atol=1e-5)
    assert saving["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-6)


@pytest.mark.slow  # compiles: a minute or more of a busy core
def test_torch_compile(workshop):
    plain = workshop.run("sft", "plain")
    compiled = workshop.run("sft", "compiled", torch_compile=True, torch_compile_backend="eager")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-5)
    assert compiled["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-6)
    assert sorted(compiled["epsilon"]) == SITES
    reloaded = AutoModelForCausalLM.from_pretrained(workshop.folder / "compiled")
    assert reloaded.get_submodule(SITES[0]).epsilon.item() == pytest.approx(compiled["epsilon"][SITES[0]])


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing(workshop, strategy):
    options = {"packing": True, "packing_strategy": strategy, "eval_packing": False, "num_train_epochs": 1}
    record = workshop.run("sft", "run", **options, max_steps=-1)
    assert np.isfinite(losses(record)).all()
    assert record["epsilon"] != record["epsilon_start"]
    assert record["steps"] < 8  # 16 documents two by two would be 8 steps


def test_gradient_accumulation_is_a_larger_batch(workshop, tiny_llama_checkpoint):
    options = {"model_name_or_path": str(tiny_llama_checkpoint), "max_grad_norm": 0}  # a model without dropout
    whole = workshop.run("sft", "whole", **options, per_device_train_batch_size=4)
    parts = workshop.run("sft", "parts", **options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    assert parts["epsilon"] == pytest.approx(whole["epsilon"], abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "precomputed"])
def test_dpo_starts_at_ln_2(workshop, options):
    recipe, trainer = workshop.trainer("dpo", "run", **options)
    assert (trainer.ref_model is None) == bool(options)
    if trainer.ref_model is not None:
        assert {type(trainer.ref_model.get_submodule(site)) for site in SITES} == {CRReLU}
    record = train_and_save(trainer, recipe)
    assert losses(record)[0] == pytest.approx(LN2, abs=1e-5)
    assert losses(record)[-1] != pytest.approx(LN2, abs=1e-4)


def test_conversations_train(workshop):
    turns = [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "the red one"}]
    data = workshop.data("sft", train=[{"messages": turns}] * 8, test=[{"messages": turns}] * 2)
    assert np.isfinite(losses(workshop.run("sft", "run", dataset_name=data))).all()


def test_streamed_data_trains(workshop):
    plain = workshop.run("sft", "plain", shuffle_dataset=False)
    streamed = workshop.run("sft", "streamed", dataset_streaming=True)
    assert len(losses(streamed)) == len(losses(plain)) == 3
    assert np.isfinite(losses(streamed)).all()


def test_an_adapter_free_run_leaves_only_whole_files(workshop):
    workshop.run("sft", "run")
    names = {path.name for path in Path(workshop.folder / "run").iterdir()}
    assert {"config.json", "model.safetensors", "run.json", "tokenizer.json", "patched"} <= names
    assert not any(name.startswith(".") for name in names)


class TestBadData:
    """Data that a trainer cannot use: one line, and no training."""

    @pytest.mark.parametrize(
        ("kind", "rows", "message"),
        [
            ("dpo", [{"prompt": "a", "answer": "b"}], "dpo needs the columns chosen and rejected"),
            ("dpo", [{"text": "a b c"}], "dpo needs the columns chosen and rejected"),
            ("sft", [{"question": "a", "answer": "b"}], "sft needs a column messages or text"),
            ("sft", [{"prompt": "only a prompt"}], "sft needs a column messages or text"),
            ("sft", [], "is empty|no rows|cannot be read"),
        ],
    )
    def test_rows(self, workshop, kind, rows, message):
        data = workshop.data(kind, train=rows, test=rows) + "/train.jsonl"
        with pytest.raises(InputError, match=message) as caught:
            workshop.run(kind, "run", dataset_name=data)
        assert len(str(caught.value).splitlines()) == 1
        assert data in str(caught.value)
        assert not (workshop.folder / "run").exists()

    def test_missing_splits(self, workshop):
        with pytest.raises(InputError, match='no split "validation"; it has: train, test'):
            workshop.run("sft", "run", eval_strategy="epoch", dataset_test_split="validation")
        with pytest.raises(InputError, match='no split "learn"'):
            workshop.run("sft", "run", dataset_train_split="learn")
        assert not (workshop.folder / "run").exists()

    def test_no_such_file(self, workshop):
        with pytest.raises(InputError, match=r"no such file or folder"):
            workshop.run("sft", "run", dataset_name="./absent.jsonl")

    def test_no_such_model(self, workshop):
        with pytest.raises(InputError, match=r"no such directory: \./absent"):
            workshop.run("sft", "run", model_name_or_path="./absent")
