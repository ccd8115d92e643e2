"""The dtype where nobody says: never one that rounds a checkpoint, and 16 bits only where they are faster."""

from types import SimpleNamespace

import pytest
import torch

from crrelu_llm import precision
from crrelu_llm.cli.main import main


def stored_in(*dtypes):
    return [SimpleNamespace(dtype=dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    ("dtypes", "times", "expected"),
    [
        ([torch.bfloat16], 2.0, ("bfloat16", "the checkpoint's own, 2.0 times faster than float32 here")),
        ([torch.float16, torch.float16], 1.3, ("float16", "the checkpoint's own, 1.3 times faster than float32 here")),
        ([torch.bfloat16], 1.1, ("float32", "the checkpoint's bfloat16 is no faster here")),
        ([torch.bfloat16], 0.2, ("float32", "the checkpoint's bfloat16 is 5.0 times slower here")),
        ([torch.bfloat16, torch.float32], 9.0, ("float32", "the checkpoints differ in dtype")),
        ([torch.float32], 9.0, ("float32", None)),
        ([None], 9.0, ("float32", None)),
        ([torch.float64], 9.0, ("float32", None)),
    ],
)
def test_the_choice(dtypes, times, expected, monkeypatch):
    monkeypatch.setattr(precision, "seconds", lambda dtype, device: 1.0 if dtype == torch.float32 else 1 / times)
    name, why = expected
    line = why and f"dtype: {name} ({why}); --dtype sets another"
    assert precision.choose_dtype(stored_in(*dtypes), "cpu") == (name, line)


def test_the_measurement():
    precision.seconds.cache_clear()
    assert 0 < precision.seconds(torch.float32, "cpu") < 1


@pytest.mark.parametrize(("times", "chosen"), [(2.0, "bfloat16"), (0.5, "float32")])
def test_patch_says_which_and_takes_it(times, chosen, tiny_checkpoint, tokenizer, tmp_path, monkeypatch, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(precision, "seconds", lambda dtype, device: 1.0 if dtype == torch.float32 else 1 / times)
    half = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    options = ["--calibration", "none", "--perplexity_data", "none"]
    assert main(["patch", str(tmp_path / "half"), "--output_dir", str(tmp_path / "out"), *options]) == 0
    assert f"dtype: {chosen} (" in capsys.readouterr().err
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype) == f"torch.{chosen}"
    assert (
        main(["patch", str(tmp_path / "half"), "--output_dir", str(tmp_path / "own"), "--dtype", "float32", *options])
        == 0
    )
    assert "dtype:" not in capsys.readouterr().err
