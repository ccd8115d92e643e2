"""`layers` and `every`: a patch of some layers alone, and that the others stay what they were, also after a reload."""

import json

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from crrelu_llm import PatchConfig, find_sites, patch, unpatch
from crrelu_llm.activation import CRReLU
from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.patching.standalone import write_standalone

IDS = torch.arange(12)[None] % 64


def logits(model):
    """What a model computes on a few tokens."""
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"layers": "2"}, [2]),
        ({"layers": 2}, [2]),
        ({"layers": "0-2,5"}, [0, 1, 2, 5]),
        ({"layers": "5,0-2"}, [0, 1, 2, 5]),
        ({"every": 2}, [0, 2, 4, 6]),
        ({"layers": "1-6", "every": 3}, [1, 4]),
    ],
)
def test_which_layers_are_selected(options, wanted):
    assert PatchConfig(**options).by_layer(7) == dict.fromkeys(wanted, "crrelu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "first"}, 'layers must be "all", or numbers and ranges as "0-5,8", not "first"'),
        ({"layers": "-1"}, "layers must be"),
        ({"layers": ""}, "layers must be"),
        ({"every": 0}, "every must be 1 or more, not 0"),
    ],
)
def test_what_selects_no_layers_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        PatchConfig(**options)


@pytest.mark.parametrize("layers", ["4", "0-9"])
def test_a_layer_that_the_model_lacks_is_refused_and_nothing_changes(layers):
    model = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(InputError, match=f"layers: {layers}: the model has 4 layers, 0 to 3"):
        patch(model, calibration="none", layers=layers)
    assert not hasattr(model.config, "crrelu")


def test_layers_that_run_backwards_name_none():
    with pytest.raises(InputError, match="layers: 3-1 names no layer"):
        patch(tiny_model("llama", num_hidden_layers=4), calibration="none", layers="3-1")


@pytest.mark.parametrize("activation", ["crrelu", "relu"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])  # bloom has no key of its own
def test_the_other_layers_stay_as_they_are_also_after_a_reload(family, activation, tmp_path):
    sizes = {"gpt2": {"n_layer": 4}, "bloom": {"n_layer": 4, "num_hidden_layers": 4}}
    model = tiny_model(family, **sizes.get(family, {"num_hidden_layers": 4}))
    before, originals = logits(model), [model.get_submodule(site.path) for site in find_sites(model)]
    report = patch(model, activation, calibration="none", layers="1-3", every=2)
    numbers = [int(next(part for part in site["path"].split(".") if part.isdigit())) for site in report.sites]
    assert sorted(set(numbers)) == [1, 3]
    assert {item["reason"].partition(": ")[2] for item in report.skipped} >= {"its layer was not selected"}
    after = logits(model)
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), after)
    for where in (model, again):
        unpatch(where)
        assert torch.equal(logits(where), before)
    assert [model.get_submodule(site.path) for site in find_sites(model)] == originals


def test_one_layer_is_one_term_of_the_whole():
    """All layers one after the other, each into a fresh model, change what the whole patch changes at that layer."""
    whole = tiny_model("llama", num_hidden_layers=4)
    patch(whole, calibration="none")
    for number in range(4):
        model = tiny_model("llama", num_hidden_layers=4)
        patch(model, calibration="none", layers=str(number))
        kinds = [isinstance(layer.mlp.act_fn, CRReLU) for layer in model.model.layers]
        assert kinds == [index == number for index in range(4)]
        x = torch.randn(3, model.config.hidden_size)
        assert torch.equal(model.model.layers[number].mlp(x), whole.model.layers[number].mlp(x))


def test_a_calibration_fits_the_selected_layers_alone():
    model = tiny_model("llama", num_hidden_layers=4)
    blocks = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    report = patch(model, blocks=blocks, layers="2")
    assert [(site["path"], site["kept"]) for site in report.sites] == [("model.layers.2.mlp.act_fn", "fit")]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in untouched.items())
    assert {name.split(".")[2] for name in state.keys() - untouched.keys()} == {"2"}


def test_a_partial_patch_may_be_made_anew_with_other_layers():
    model = tiny_model("llama", num_hidden_layers=4)
    patch(model, calibration="none", layers="0")
    patch(model, calibration="none", layers="3")
    assert [isinstance(layer.mlp.act_fn, CRReLU) for layer in model.model.layers] == [False, False, False, True]
    patch(model, calibration="none")
    assert all(isinstance(layer.mlp.act_fn, CRReLU) for layer in model.model.layers)


def test_the_section_says_what_was_kept_and_older_versions_refuse_it():
    model = tiny_model("llama", num_hidden_layers=2)
    patch(model, calibration="none", layers="1")
    section = model.config.crrelu
    assert section["version"] == 4 and section["kept"] == [{"path": "model.layers.0.mlp.act_fn", "original": "silu"}]
    assert model.config.hidden_act == "crrelu"  # so that a program without this package fails


def test_a_standalone_checkpoint_of_some_layers_computes_the_same(tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=4)
    patch(model, calibration="none", layers="0,2")
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    write_standalone(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        alone = auto_class.from_pretrained(tmp_path, trust_remote_code=True)
        layers = (alone.model if auto_class is AutoModelForCausalLM else alone).layers
        assert [type(layer.mlp.act_fn).__name__ for layer in layers] == ["CRReLU", "SiLUActivation"] * 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)), wanted)


def test_the_command_patches_some_layers(tmp_path, capsys):
    argv = ["patch", "builtin:nano", "--calibration", "none", "--perplexity_data", "none", "--output_dir"]
    assert main([*argv, str(tmp_path / "some"), "--layers", "0-1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["path"].split(".")[2] for site in report["sites"]] == ["0", "1"]
    assert report["options"]["layers"] == "0-1" and report["options"]["every"] == 1
    assert main([*argv, str(tmp_path / "none"), "--layers", "4"]) == 2
    assert capsys.readouterr().err.endswith("crrelu patch: layers: 4: the model has 4 layers, 0 to 3\n")


def test_a_trained_model_goes_back_in_all_its_layers_or_not_at_all():
    model = tiny_model("llama", num_hidden_layers=2)
    patch(model, calibration="none")
    model.config.crrelu["weights_changed"] = True
    with pytest.raises(InputError, match="its weights fit crrelu in every layer; go back without layers and every"):
        patch(model, "silu", calibration="none", layers="0")
