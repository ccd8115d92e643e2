"""Checkpoint in, patched checkpoint out: what is on disk afterwards, and what is not when it fails."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import PatchConfig, patch
from crrelu_llm.errors import InputError
from crrelu_llm.patching.transform import origin, patch_checkpoint, read_report

REPORT = {
    "model", "model_type", "activation", "epsilon_per", "options", "sites", "skipped", "calibration", "perplexity",
    "seconds", "versions",
}  # fmt: skip


def test_the_checkpoint_is_the_model_patched_in_memory(tiny_checkpoint, tmp_path):
    config = PatchConfig(epsilon_init=0.2, epsilon_per="channel", calibration="none")
    patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    patch(model, config)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_files(tiny_checkpoint, tmp_path):
    report = patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "out")
    names = {path.name for path in tiny_checkpoint.iterdir()} | {"patch_report.json", "patch_origin.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out/patch_report.json").read_text()) == report == read_report(tmp_path / "out")
    text = "Strings and bytes."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tiny_checkpoint, tmp_path / "out")]
    assert tokenizers[0](text) == tokenizers[1](text)
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_report(tiny_checkpoint, tmp_path):
    config = PatchConfig("gelu", calibration="none")
    report = patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert set(report) == REPORT
    assert report["model"] == str(tiny_checkpoint)
    assert (report["model_type"], report["activation"], report["epsilon_per"]) == ("gpt2", "gelu", "layer")
    assert report["options"]["calibration"] == "none"
    assert [site["path"] for site in report["sites"]] == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert report["perplexity"] is None
    assert report["seconds"] > 0
    assert {"crrelu_llm", "torch", "transformers"} <= set(report["versions"])
    assert read_report(tiny_checkpoint) is None


@pytest.mark.parametrize("calibration", ["none", "fit"])
def test_perplexity_is_measured_on_the_right_model_each_time(calibration, tiny_checkpoint, text_file, tmp_path):
    states = []

    def measure(model, tokenizer):
        act = model.transformer.h[0].mlp.act
        states.append(round(act.epsilon.item(), 4) if hasattr(act, "epsilon") else type(act).__name__)
        return float(len(states))

    config = PatchConfig(calibration=calibration, calibration_data=str(text_file), epsilon_init=0.02)
    report = patch_checkpoint(
        str(tiny_checkpoint), config, tmp_path / "out", perplexity=measure, perplexity_of={"tokens": 5, "data": "x"}
    )
    if calibration == "none":
        assert states == ["NewGELUActivation", 0.02]
        assert report["perplexity"] == {"before": 1.0, "after_naive": None, "after": 2.0, "tokens": 5, "data": "x"}
    else:
        assert states[:2] == ["NewGELUActivation", 0.02]
        assert states[2] == round(report["sites"][0]["epsilon_mean"], 4) != 0.02
        assert report["perplexity"] == {"before": 1.0, "after_naive": 2.0, "after": 3.0, "tokens": 5, "data": "x"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_weights_and_of_epsilon(dtype, tiny_checkpoint, tmp_path):
    patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith("epsilon") else getattr(torch, dtype)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_without_a_patch_it_only_converts(tiny_checkpoint, tmp_path):
    report = patch_checkpoint(str(tiny_checkpoint), None, tmp_path / "out")
    assert set(report) == REPORT
    assert report["activation"] is None
    assert report["sites"] == []
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_checkpoint, tmp_path / "out"))
    assert torch.equal(logits(one), logits(other))


def test_the_same_patch_of_a_patched_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "one")
    with pytest.raises(InputError, match="one is already patched to crrelu with these options") as caught:
        patch_checkpoint(str(tmp_path / "one"), PatchConfig(calibration="none"), tmp_path / "two")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_patched_checkpoint_can_be_patched_to_another_activation(tiny_checkpoint, tmp_path):
    patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "one")
    measured = []

    def measure(model, tokenizer):
        measured.append(type(model.transformer.h[0].mlp.act).__name__)
        return 1.0

    report = patch_checkpoint(
        str(tmp_path / "one"), PatchConfig("relu", calibration="none"), tmp_path / "two", perplexity=measure
    )
    straight = patch_checkpoint(str(tiny_checkpoint), PatchConfig("relu", calibration="none"), tmp_path / "three")
    assert report["sites"] == straight["sites"]
    # "patched" is what it was, "before" the original activation
    assert measured == ["CRReLU", "NewGELUActivation", "ReLU"]
    two, three = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("two", "three"))
    assert torch.equal(logits(two), logits(three))
    assert two.config.crrelu == three.config.crrelu


def test_a_checkpoint_whose_weights_a_calibration_changed_is_refused(tiny_checkpoint, tmp_path):
    patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "one")
    file = tmp_path / "one" / "config.json"
    config = json.loads(file.read_text())
    config["crrelu"]["weights_changed"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="weights were fitted to that; start from the original checkpoint") as caught:
        patch_checkpoint(str(tmp_path / "one"), PatchConfig("gelu", calibration="none"), tmp_path / "two")
    assert "\n" not in str(caught.value)


def test_trained_weights_may_go_back_to_the_original_activation_as_they_are(tiny_checkpoint, tmp_path):
    patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    model.config.crrelu["weights_changed"] = True  # as training does
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "trained")
    patch_checkpoint(str(tmp_path / "trained"), PatchConfig("gelu_new", calibration="none"), tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        original.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    assert torch.equal(logits(back), logits(original))
    assert back.state_dict().keys() == original.state_dict().keys()
    assert back.config.activation_function == "gelu_new"


def test_a_calibration_on_the_way_back_fits_what_the_trained_model_computes(tiny_llama_checkpoint, tmp_path):
    config = PatchConfig(epsilon_per="channel", calibration_tokens=1024)
    patch_checkpoint(str(tiny_llama_checkpoint), config, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        for layer in model.model.layers:  # each channel elsewhere, as a long training leaves it
            layer.mlp.act_fn.epsilon.add_(torch.linspace(-0.5, 1.0, layer.mlp.act_fn.num_channels))
    model.config.crrelu["weights_changed"] = True
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_llama_checkpoint).save_pretrained(tmp_path / "trained")
    backs = {"fit": PatchConfig("silu", calibration_tokens=1024), "none": PatchConfig("silu", calibration="none")}
    errors = {}
    for name, config in backs.items():
        patch_checkpoint(str(tmp_path / "trained"), config, tmp_path / name)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        errors[name] = (logits(back) - logits(model)).norm().item()
    assert errors["fit"] < 0.5 * errors["none"]
    with pytest.raises(InputError, match="weights were fitted to that"):
        patch_checkpoint(str(tmp_path / "trained"), PatchConfig("relu"), tmp_path / "other")


@pytest.mark.parametrize("dtype", ["int8", "float31", "Tensor"])
def test_an_impossible_dtype_is_refused(dtype, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=f"unknown dtype '{dtype}'; choose float32, bfloat16, float16"):
        patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tiny_checkpoint, tmp_path):
    def fails(model, tokenizer):
        raise MemoryError

    with pytest.raises(MemoryError):
        patch_checkpoint(str(tiny_checkpoint), PatchConfig(calibration="none"), tmp_path / "out", perplexity=fails)
    with pytest.raises(InputError, match="no such file"):
        config = PatchConfig(calibration="fit", calibration_data=str(tmp_path / "none.txt"))
        patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rwkv_is_saved_with_the_weights_that_were_loaded(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    config = AutoConfig.for_model("rwkv", vocab_size=len(tokenizer), **sizes, rescale_every=2, context_length=64)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    before = load_file(tmp_path / "original" / "model.safetensors")
    patch_checkpoint(
        str(tmp_path / "original"), PatchConfig(calibration="none"), tmp_path / "patched"
    )  # it runs once, to be checked
    after = load_file(tmp_path / "patched" / "model.safetensors")
    assert {name for name in after if name.endswith("epsilon")} == set(after) - set(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_another_calibration_text_is_another_origin(tiny_checkpoint, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    config = PatchConfig(calibration="fit", calibration_data=str(text))
    first = origin(str(tiny_checkpoint), config, "float32", None)
    assert origin(str(tiny_checkpoint), config, "float32", None) == first
    text.write_text(text_file.read_text() + "More.")
    assert origin(str(tiny_checkpoint), config, "float32", None) != first
