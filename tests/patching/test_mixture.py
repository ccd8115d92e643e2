"""One activation a layer: the text that stands for it, and a model that has several, saved, reloaded and put back."""

import json

import pytest
import torch
from tiny import tiny_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM

from crrelu_llm import PatchConfig, find_sites, patch, unpatch
from crrelu_llm.activation import Calibrated, CRReLU
from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.patching import mixture, section
from crrelu_llm.patching.activations import activation_name
from crrelu_llm.patching.standalone import write_standalone

IDS = token_ids(1, 12) % 64
TEXT = "0-1=relu,3-=crrelu"
NAMES = ["relu", "relu", "silu", "crrelu"]


def logits(model):
    """What a model computes on a few tokens."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def four_layers(family="llama"):
    return tiny_model(family, **{"gpt2": {"n_layer": 4}}.get(family, {"num_hidden_layers": 4}))


def names(model):
    return [activation_name(model.get_submodule(site.path)) for site in find_sites(model)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (TEXT, {0: "relu", 1: "relu", 3: "crrelu", 4: "crrelu"}),
        ({"0-1": "relu", "3-": "crrelu"}, {0: "relu", 1: "relu", 3: "crrelu", 4: "crrelu"}),
        ({4: "relu", "0,2": "gelu"}, {0: "gelu", 2: "gelu", 4: "relu"}),
        ("0-=crrelu", dict.fromkeys(range(5), "crrelu")),
    ],
)
def test_which_layer_gets_which(text, wanted):
    config = PatchConfig(text)
    assert config.by_layer(5) == wanted and PatchConfig(config.activation) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-1=relu,crrelu", "write layers and their activations as 0-5=relu,6-=crrelu, not '0-1=relu,crrelu'"),
        ("relu=0-1", "write layers and their activations"),
        ("0-1=", "write layers and their activations"),
        ("0-1=relu,2", "write layers and their activations"),
        ({}, "unknown activation ''"),
        ("0-1=crelu", "unknown activation 'crelu'; choose one of crrelu, "),
        ("0-2=relu,2-=crrelu", "layer 2 has two, by 0-2 and by 2-"),
        ("3-=relu,5=gelu", "layer 5 has two, by 3- and by 5"),
        ("3-1=relu", "3-1 names no layer"),
    ],
)
def test_what_cannot_be_is_one_line(text, words):
    with pytest.raises(InputError) as caught:
        PatchConfig(text)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options", [{"layers": "0"}, {"every": 2}, {"density": "fitted"}], ids=lambda options: next(iter(options))
)
def test_options_that_do_not_go_with_it(options):
    with pytest.raises(InputError, match=r"omit layers and every|leave density out"):
        PatchConfig(TEXT, **options)


@pytest.mark.parametrize("text", ["0-1=relu,4=crrelu", "0-7=relu", "5-=crrelu"])
def test_a_layer_that_the_model_lacks_is_refused_and_nothing_changes(text):
    model = four_layers()
    with pytest.raises(InputError, match="the model has 4 layers, 0 to 3"):
        patch(model, text, calibration="none")
    assert not hasattr(model.config, "crrelu") and names(model) == ["silu"] * 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])  # bloom has no key of its own
def test_it_is_what_was_saved_and_goes_back(family, tmp_path):
    sizes = {"gpt2": {"n_layer": 3}, "bloom": {"n_layer": 3, "num_hidden_layers": 3}}
    model = tiny_model(family, **sizes.get(family, {"num_hidden_layers": 3}))
    before, count = logits(model), len(find_sites(model))
    original = find_sites(model)[0].original
    report = patch(model, f"0=relu,{count - 1}=crrelu", calibration="none", epsilon_init=0.3)
    assert [site["activation"] for site in report.sites] == ["relu", "crrelu"]
    after = logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), after)
    for where in (model, again):
        found = [activation_name(where.get_submodule(site["path"])) for site in where.config.crrelu["sites"]]
        assert found == ["relu", "crrelu"] and where.config.crrelu["version"] == 5
        unpatch(where)
        assert torch.equal(logits(where), before) and find_sites(where)[0].original == original


def test_a_calibration_fits_each_site_to_its_own_and_is_reloaded(tmp_path):
    model = four_layers()
    patch(model, TEXT, blocks=token_ids(8, 24))
    kinds = [type(layer.mlp.act_fn) for layer in model.model.layers]
    assert kinds[:2] == [Calibrated, Calibrated] and kinds[3] is CRReLU and kinds[2] not in (Calibrated, CRReLU)
    plain = four_layers()
    patch(plain, TEXT, calibration="none")
    native = logits(four_layers())
    after = logits(model)
    assert (after - native).norm() < 0.5 * (logits(plain) - native).norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after)


def test_what_the_config_says_fails_without_this_package():
    model = four_layers()
    patch(model, "0-1=relu,2-=gelu", calibration="none")
    assert model.config.hidden_act == "crrelu" and section.crrelu_paths(model.config.crrelu) == []
    patch(model, TEXT, calibration="none")
    assert names(model) == NAMES
    with pytest.raises(InputError, match="already patched to 0-1=relu,3-=crrelu with these options"):
        patch(model, TEXT, calibration="none")
    assert names(model) == NAMES
    unpatch(model)
    assert model.config.hidden_act == "silu" and names(model) == ["silu"] * 4


def test_a_standalone_checkpoint_computes_the_same(tmp_path):
    model = four_layers()
    patch(model, TEXT, calibration="none")
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    write_standalone(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        alone = auto_class.from_pretrained(tmp_path, trust_remote_code=True)
        layers = (alone.model if auto_class is AutoModelForCausalLM else alone).layers
        assert [activation_name(layer.mlp.act_fn) for layer in layers] == NAMES
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)), wanted)
    assert "relu in layers 0-1, crrelu in layers 3-" in (tmp_path / "README.md").read_text()
    unpatch(model)
    patch(model, TEXT, blocks=token_ids())
    model.save_pretrained(tmp_path / "calibrated")
    with pytest.raises(InputError, match="relu would silently be computed without its calibration"):
        write_standalone(tmp_path / "calibrated")


def test_the_command(tmp_path, capsys):
    argv = ["patch", "builtin:nano", "--calibration", "none", "--perplexity_data", "none", "--output_dir"]
    assert main([*argv, str(tmp_path / "some"), "--activation", "0-1=relu,2=crrelu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["activation"] for site in report["sites"]] == ["relu", "relu", "crrelu"]
    assert [site["epsilon_mean"] is None for site in report["sites"]] == [True, True, False]
    assert main([*argv, str(tmp_path / "none"), "--activation", "0-4=relu"]) == 2
    assert capsys.readouterr().err.endswith("activation: 0-4=relu: the model has 4 layers, 0 to 3\n")


def test_in_words():
    assert mixture.in_words("relu") == "relu" and mixture.names_of(TEXT) == ["relu", "crrelu"]
