"""Image models: sites, patch, calibration on images, reload and the way back; and towers of multimodal models."""

import json

import pytest
import torch
from pictures import folder, logits, pixels, save, vit

from crrelu_llm import CRReLU, find_sites, patch, unpatch
from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.patching.sites import survey


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a tiny ViT."""
    return save(vit(), tmp_path_factory.mktemp("vit") / "vit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of images."""
    return folder(tmp_path_factory.mktemp("images") / "data", train=24)


def multimodal():
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64}  # fmt: skip
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=4)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_a_plain_vit_is_no_tower_of_something_else():
    found, left_alone = survey(vit())
    assert [(site.path, site.original, site.num_channels, site.kind) for site in found] == [
        (f"vit.layers.{layer}.mlp.activation_fn", "gelu", 24, "plain") for layer in (0, 1)
    ]
    assert not left_alone


def test_a_tower_is_left_alone_unless_asked_for():
    model = multimodal()
    main_part, tower, both = (find_sites(model, parts) for parts in ("main", "vision", "all"))
    assert len(main_part) == 2 and all("language_model" in site.path for site in main_part)
    assert len(tower) == 1 and all("vision_tower" in site.path for site in tower)
    assert sorted(site.path for site in both) == sorted(site.path for site in main_part + tower)
    reasons = {item.reason for item in survey(model, "vision")[1] if "language_model" in item.path}
    assert reasons == {"not in the vision tower"}


def test_a_language_model_has_no_tower():
    from crrelu_llm.patching.loading import skeleton

    with pytest.raises(InputError, match="has no MLP in its vision tower"):
        find_sites(skeleton("builtin:nano"), "vision")


def test_patched_reloaded_and_put_back(tmp_path):
    from transformers import AutoModelForImageClassification

    model = vit()
    native = logits(model)
    patch(model, epsilon_per="channel", calibration="none")
    with torch.no_grad():
        for layer in (0, 1):
            model.vit.layers[layer].mlp.activation_fn.epsilon.copy_(torch.randn(24))
    patched = logits(model)
    assert not torch.allclose(patched, native, rtol=1e-4)
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())
    assert section["hidden_act"] == "crrelu" and len(section["crrelu"]["sites"]) == 2
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again.vit.layers[0].mlp.activation_fn) is CRReLU
    assert torch.equal(logits(again), patched)
    unpatch(again)
    assert torch.equal(logits(again), native)


@pytest.mark.parametrize("level", ["fit", pytest.param("refit", marks=pytest.mark.slow)])
def test_a_calibration_on_images_keeps_the_function(level, checkpoint, data, tmp_path):
    from transformers import AutoModelForImageClassification

    argv = ["patch", checkpoint, "--calibration", level, "--calibration_data", data, "--calibration_images", "24"]
    assert main([*argv, "--output_dir", str(tmp_path / "fit")]) == 0
    report = json.loads((tmp_path / "fit" / "patch_report.json").read_text())
    assert report["perplexity"] is None and report["options"]["calibration_images"] == 24
    assert set(report["accuracy"]) == set(report["loss"]) == {"before", "after_naive", "after", "images", "data"}
    assert report["accuracy"]["images"] == 9
    for site in report["sites"]:
        assert site["relative_error"] < 0.5 * site["relative_error_naive"]
        assert site["kept"] in ("fit", level)
    model, native = (AutoModelForImageClassification.from_pretrained(at) for at in (tmp_path / "fit", checkpoint))
    plain = vit()
    patch(plain, calibration="none")
    batch = pixels(16)
    near, far = ((logits(other, batch) - logits(native, batch)).norm() for other in (model, plain))
    assert near < 0.5 * far
    naive = {name: report[name]["after_naive"] for name in ("accuracy", "loss")}
    assert abs(report["loss"]["after"] - report["loss"]["before"]) < abs(naive["loss"] - report["loss"]["before"])
    readme = (tmp_path / "fit" / "README.md").read_text()
    assert "AutoModelForImageClassification" in readme and "vllm" not in readme


@pytest.mark.slow
def test_a_calibration_on_images_is_the_same_again(data):
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    found = []
    for _ in range(2):
        model = vit()
        patch(model, tokenizer=processor, calibration_data=data, calibration_images=20)
        found.append(logits(model))
    assert torch.equal(*found)


def test_what_a_calibration_on_images_cannot_read(checkpoint, data, tmp_path, capsys):
    argv = ["patch", checkpoint, "--output_dir", str(tmp_path / "out")]
    for more, words in (
        ([], "an image model is calibrated on images, and calibration_data is builtin:docstrings"),
        (["--calibration_data", data], "24 images, fewer than the 256 asked for"),
        (["--calibration_data", "builtin:nothing"], "no such built-in data set"),
        (["--parts", "vision"], "parts: vision goes with calibration: none"),
        (["--calibration", "none", "--parts", "audio"], 'parts must be "main", "vision" or "all", not "audio"'),
    ):
        assert main([*argv, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_inspect_reads_an_image_models_config(checkpoint, capsys):
    assert main(["inspect", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "vit: 2 sites" in out and "hidden_act" in out
