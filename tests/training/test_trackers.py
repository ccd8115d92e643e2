"""Experiment trackers get ε of every site; the terminal does not."""

import json

import pytest

from crrelu_llm.training.run import run_recipe

SITES = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


@pytest.mark.needs("tensorboard")
def test_tensorboard(workshop, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = workshop.folder / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    record = workshop.run("sft", "run", report_to="tensorboard")
    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    steps = [entry for entry in record["history"] if "loss" in entry]
    for name in ("loss", "epsilon_mean", *(f"epsilon/{site}" for site in SITES)):
        scalars = accumulator.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([entry[name] for entry in steps], rel=1e-6)


@pytest.mark.needs("trackio")
def test_trackio(workshop, monkeypatch):
    # Not by its environment variable, which is read once, when the first trainer of a process is built
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", workshop.folder / "trackio")
    record = workshop.run("sft", "run", report_to="trackio", project="crrelu-test", run_name="first")
    assert record["status"] == "done"
    stored = b"".join(path.read_bytes() for path in (workshop.folder / "trackio").iterdir())
    for site in SITES:
        assert f'"train/epsilon/{site}":{record["epsilon"][site]}'.encode() in stored


@pytest.mark.parametrize("disable_tqdm", [True, False], ids=["plain", "progress bar"])
def test_the_terminal_shows_only_the_mean(workshop, capsys, disable_tqdm):
    argv = workshop.argv("sft", "run", disable_tqdm=disable_tqdm)
    record = run_recipe("sft", argv)
    printed = "".join(capsys.readouterr())
    assert "epsilon_mean" in printed
    assert "epsilon/" not in printed
    assert "epsilon/" in json.dumps(record["history"])
