"""`crrelu inspect`: the contract of its JSON, its table, and that a config alone is enough."""

import json

import pytest
from families import family_config
from tiny import FAMILIES, tiny_config, tiny_model
from transformers import AutoConfig

from crrelu_llm import patch
from crrelu_llm.cli import main as command_line


def inspect(*argv):
    return command_line.main(["inspect", *map(str, argv)])


def document(capsys, *argv):
    assert inspect(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_from_a_config_alone(family, tmp_path, capsys):
    tiny_config(family).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    found = document(capsys, tmp_path)
    _, count, width, kind = FAMILIES[family]
    assert set(found) == {"model_type", "sites", "left_alone", "config_keys"}
    assert found["model_type"] == family
    assert len(found["sites"]) == count
    for site in found["sites"]:
        assert set(site) == {"path", "attribute", "original", "num_channels", "kind"}
        if width:
            assert (site["num_channels"], site["kind"]) == (width, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_config_keys(tmp_path, capsys):
    for family, keys in {"llama": ["hidden_act"], "gpt2": ["activation_function"], "bloom": []}.items():
        tiny_config(family).save_pretrained(tmp_path / family)
        assert document(capsys, tmp_path / family)["config_keys"] == keys


def test_what_is_left_alone_has_a_reason(tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
    AutoConfig.for_model("bert", is_decoder=True, **sizes).save_pretrained(tmp_path)
    (item,) = document(capsys, tmp_path)["left_alone"]
    assert item == {
        "path": "cls.predictions.transform.transform_act_fn", "activation": "gelu", "reason": "inside cls: head"
    }  # fmt: skip


def test_no_weights_are_allocated(tmp_path, capsys):
    """A trillion parameters: 4 TB, were there any."""
    AutoConfig.for_model(
        "llama", num_hidden_layers=96, hidden_size=32768, intermediate_size=65536, num_attention_heads=256
    ).save_pretrained(tmp_path)
    found = document(capsys, tmp_path)
    assert len(found["sites"]) == 96
    assert found["sites"][95]["num_channels"] == 65536


def test_table(tmp_path, capsys):
    tiny_config("gpt2").save_pretrained(tmp_path)
    assert inspect(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "gpt2: 2 sites",
        "  transformer.h.0.mlp.act  gelu_new  128 channels  plain",
        "  transformer.h.1.mlp.act  gelu_new  128 channels  plain",
        "config keys that mean the MLP alone: activation_function",
    ]


def test_activations_inside_methods_are_functional_sites(tmp_path, capsys):
    family_config("minimax_m3_vl_text").save_pretrained(tmp_path)
    found = document(capsys, tmp_path)
    assert {site["kind"] for site in found["sites"]} == {"functional"}
    assert [site["path"] for site in found["sites"]] == [
        "model.layers.0.mlp.act_fn",
        "model.layers.1.mlp.experts.act_fn",
        "model.layers.1.mlp.shared_experts.act_fn",
    ]
    assert found["config_keys"] == []


def test_a_patched_checkpoint_says_so(tmp_path, capsys):
    model = tiny_model("llama")
    patch(model, calibration="none")
    model.config.save_pretrained(tmp_path)
    assert inspect(tmp_path) == 0
    assert "llama: 2 sites, patched to crrelu" in capsys.readouterr().out
    found = document(capsys, tmp_path)
    assert [site["original"] for site in found["sites"]] == ["crrelu", "crrelu"]
    assert found["config_keys"] == ["hidden_act"]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mamba2", "mamba2 has no MLP: there is no activation to swap"),
        ("t5", "t5 has no causal language model"),
    ],
)
def test_models_without_sites(family, words, tmp_path, capsys):
    AutoConfig.for_model(family, num_hidden_layers=2).save_pretrained(tmp_path)
    assert inspect(tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("crrelu inspect: ")
    assert printed.err.splitlines()[-1].count(words) == 1


@pytest.mark.parametrize("argv", [["/no/such/dir"], ["missing.gguf"], ["builtin:giant"], ["nobody/no-such-model"]])
def test_models_that_cannot_be_had(argv, capsys):
    assert inspect(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert argv[0] in printed.err


@pytest.mark.needs("gguf")
def test_files_that_are_no_model(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    for model in (tmp_path / "broken.gguf", tmp_path):
        assert inspect(model) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert str(model) in printed.err
