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


def test_what_is_not_calibrated_cannot_be_folded(tiny_checkpoint, tmp_path, capsys):
    argv = ["patch", str(tiny_checkpoint), "--output_dir", str(tmp_path / "out"), "--calibration", "none", "--fold"]
    assert main(argv) == 2
    assert "set calibration: fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gated_mlp_cannot_be_folded_and_nothing_is_written(tiny_llama_checkpoint, options, tmp_path):
    with pytest.raises(InputError, match=r"--fold: .*gated MLP.*leave --fold out"):
        patch_checkpoint(str(tiny_llama_checkpoint), PatchConfig(**options), tmp_path / "out", fold=True)
    assert not (tmp_path / "out").exists()
