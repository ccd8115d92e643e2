"""The crrelu section of config.json: what it says, which keys of the family follow, and what is no section."""

import json

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from crrelu_llm import find_sites, patch
from crrelu_llm.errors import InputError
from crrelu_llm.patching.section import VERSION, mlp_config_keys


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"hidden_act": "silu"}),
        ("gpt2", {"activation_function": "gelu_new"}),
        ("gemma3_text", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("mixtral", {"hidden_act": "silu"}),
        ("falcon", {"activation": "gelu"}),
        ("bloom", {}),
    ],
)
def test_config_keys_that_mean_the_mlp_are_set(family, keys):
    model = tiny_model(family)
    patch(model, calibration="none")
    assert model.config.crrelu["config_keys"] == keys
    assert all(getattr(model.config, key) == "crrelu" for key in keys)


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_a_key_that_also_reaches_a_convolution_is_left_alone(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=4))
    assert mlp_config_keys(model, find_sites(model)) == {}


def test_config_names_the_sites():
    model = tiny_model("gpt2")
    patch(model, epsilon_per="channel", epsilon_init=0.2, calibration="none")
    section = model.config.to_dict()["crrelu"]
    assert section["sites"][1] == {
        "path": "transformer.h.1.mlp.act", "original": "gelu_new", "num_channels": 128, "kind": "plain"
    }  # fmt: skip
    assert (section["epsilon_per"], section["epsilon_init"], section["version"]) == ("channel", 0.2, 1)


def write_section(directory, change):
    """Saves a patched tiny model whose section has been changed."""
    model = tiny_model("llama")
    patch(model, calibration="none")
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["crrelu"] = change(config["crrelu"])
    (directory / "config.json").write_text(json.dumps(config))


def test_a_newer_section_is_refused_in_one_line(tmp_path):
    write_section(tmp_path, lambda section: section | {"version": VERSION + 1})
    with pytest.raises(InputError, match=rf"newer crrelu_llm \(section version {VERSION + 1}.*upgrade") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_section_of_another_program_is_refused(tmp_path):
    write_section(tmp_path, lambda section: True)
    with pytest.raises(InputError, match="not one that crrelu_llm wrote"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
