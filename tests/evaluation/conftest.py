"""A folder to train in, and the data of a small suite, each with a data cache of its own."""

import datasets
import pytest
from runs import Workshop
from suite_data import write_all


@pytest.fixture
def workshop(tiny_checkpoint, tmp_path, monkeypatch):
    """A `Workshop` with the tiny GPT-2."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for the processes that a test starts
    return Workshop(tmp_path, tiny_checkpoint)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A data_dir with five small tasks, and a data cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_all(tmp_path / "data")
