"""A folder to train in, with a data cache of its own."""

import datasets
import pytest
from runs import Workshop


@pytest.fixture
def workshop(tiny_checkpoint, tmp_path, monkeypatch):
    """A `Workshop` with the tiny GPT-2."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for the processes that a test starts
    return Workshop(tmp_path, tiny_checkpoint)
