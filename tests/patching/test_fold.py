"""`--fold`: a calibrated network as a plain one."""

import json

import pytest
import torch

import crrelu_llm  # noqa: F401
from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig
from crrelu_llm.patching.loading import load_model
from crrelu_llm.patching.transform import patch_checkpoint


@pytest.fixture(scope="module")
def options(text_file):
    return {"calibration_tokens": 512, "calibration_data": str(text_file)}


@pytest.mark.parametrize("activation", ["crrelu", "gelu"])
def test_a_folded_network_computes_the_same_with_the_activation_alone(tiny_checkpoint, options, tmp_path, activation):
    for name, fold in (("calibrated", False), ("folded", True)):
        patch_checkpoint(str(tiny_checkpoint), PatchConfig(activation, **options), tmp_path / name, fold=fold)
    calibrated, folded = (load_model(str(tmp_path / name)) for name in ("calibrated", "folded"))
    ids = torch.arange(40, 104)[None]
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (calibrated, folded))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert not any(name.endswith((".scale", ".shift", ".gain", ".offset")) for name in folded.state_dict())
    section = json.loads((tmp_path / "folded" / "config.json").read_text())["crrelu"]
    assert section["version"] == 1 and section["weights_changed"] and "calibrated" not in section


@pytest.fixture(scope="module")
def folded(tmp_path_factory, options):
    """The nano, its calibrated CRReLU folded."""
    path = tmp_path_factory.mktemp("folded") / "crrelu"
    patch_checkpoint("builtin:nano", PatchConfig(**options), path, fold=True)
    return path


def test_a_folded_network_goes_back_and_keeps_what_it_computes_where_that_is_fitted(folded, options, tmp_path, caplog):
    """GPT-2 for llama.cpp: GELU without numbers around it, fitted to the CRReLU that the weights were folded for."""

    def back(name, **how):
        config = PatchConfig("gelu_new", **how)
        fold = how["calibration"] == "fit"
        return patch_checkpoint(str(folded), config, tmp_path / name, fold=fold, perplexity=measure)["perplexity"]

    def measure(model, _):
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.exp().item()

    ids = torch.arange(40, 168)[None]
    plain, fitted = back("plain", calibration="none"), back("fitted", calibration="fit", **options)
    assert "training, refit or --fold has changed the weights since the patch" in caplog.text
    assert plain["patched"] == fitted["patched"] and plain["after"] == fitted["after_naive"]
    assert abs(fitted["after"] / fitted["patched"] - 1) < 0.2 * abs(plain["after"] / plain["patched"] - 1)
    original = load_model("builtin:nano")
    for name in ("plain", "fitted"):
        found = load_model(str(tmp_path / name))
        assert found.state_dict().keys() == original.state_dict().keys()  # nothing around the activation
        assert found.config.activation_function == "gelu_new"
        assert "crrelu_llm is not needed" in (tmp_path / name / "README.md").read_text()
        assert found.config.crrelu["weights_changed"] is (name == "fitted")


def test_what_is_not_calibrated_cannot_be_folded(tiny_checkpoint, tmp_path, capsys):
    argv = ["patch", str(tiny_checkpoint), "--output_dir", str(tmp_path / "out"), "--calibration", "none", "--fold"]
    assert main(argv) == 2
    assert "set calibration: fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gated_mlp_cannot_be_folded_and_nothing_is_written(tiny_llama_checkpoint, options, tmp_path):
    with pytest.raises(InputError, match=r"--fold: .*gated MLP.*leave --fold out"):
        patch_checkpoint(str(tiny_llama_checkpoint), PatchConfig(**options), tmp_path / "out", fold=True)
    assert not (tmp_path / "out").exists()
