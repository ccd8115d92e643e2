"""Tuning a recipe key for each arm: `crrelu compare --tune`."""

import json
import math

import pytest
from datasets import Dataset
from runs import Workshop, write_recipe

from crrelu_llm.cli.main import main
from crrelu_llm.comparison import tuning
from crrelu_llm.errors import InputError

RATES = ("1e-4", "1e-2", "1e3")  # the last diverges


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint):
    """A folder with data, and a recipe of three steps that is evaluated at each."""
    workshop = Workshop(tmp_path_factory.mktemp("tuning"), tiny_checkpoint)
    values = workshop.values("sft", "unused", max_steps=3, calibration_tokens=2048)
    values |= {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant"}
    del values["activation"], values["output_dir"], values["seed"]
    write_recipe(workshop.folder / "recipe.yaml", values)
    return workshop.folder


def compare(folder, *options):
    """Exit status of `crrelu compare sft` of two arms and two seeds."""
    argv = ["compare", "sft", "--config", str(folder / "recipe.yaml"), "--arms", "native", "crrelu"]
    return main([*argv, "--seeds", "0", "1", "--discard_models", *options])


@pytest.fixture(scope="module")
def tuned(folder):
    """A finished comparison with a tuned learning rate, whose patched copies are elsewhere."""
    options = ("--tune", f"learning_rate={','.join(RATES)}", "--patched_dir", str(folder / "copies"))
    assert compare(folder, *options, "--output_dir", str(folder / "tuned")) == 0
    return folder / "tuned"


def run_of(directory, arm, seed):
    """run.json of a run."""
    return json.loads((directory / arm / f"seed-{seed}" / "run.json").read_text())


def test_each_arm_gets_the_rate_with_the_lowest_loss_on_held_out_rows(tuned):
    report = json.loads((tuned / "report.json").read_text())
    tries = report["tuning"]["tries"]
    assert [entry["arm"] for entry in tries] == ["native", "crrelu"]
    for entry in tries:
        assert list(entry["values"]) == [f"learning_rate={rate}" for rate in RATES]
        measured = {
            f"learning_rate={rate}": run_of(tuned / "tuning", f"{entry['arm']}/learning_rate={rate}", tuning.SEED)
            for rate in RATES
        }
        losses = {name: run["metrics"]["loss"] for name, run in measured.items() if run["status"] == "done"}
        assert {k: v for k, v in entry["values"].items() if v is not None} == {
            k: v for k, v in losses.items() if math.isfinite(v)
        }
        best = min(losses, key=lambda name: losses[name])
        assert entry["chosen"] == {"learning_rate": best.partition("=")[2]}
        for seed in (0, 1):
            assert run_of(tuned, entry["arm"], seed)["recipe"]["learning_rate"] == float(
                entry["chosen"]["learning_rate"]
            )


def test_no_row_that_tries_are_judged_on_is_trained_on_or_tested(tuned):
    data = json.loads((tuned / "comparison.json").read_text())["data"]
    held_out = json.loads((tuned / "tuning" / "comparison.json").read_text())["data"]
    assert [entry["rows"] for entry in data] == [13, 8] and [entry["rows"] for entry in held_out] == [13, 3]
    assert held_out[0] == data[0] and held_out[1]["sha256"] != data[1]["sha256"]
    assert json.loads((tuned / "report.json").read_text())["tuning"]["rows"] == 3


def test_all_runs_share_one_patched_copy(folder, tuned):
    assert [str(path.relative_to(folder)) for path in folder.rglob("patched")] == ["copies/crrelu/patched"]
    arms = json.loads((tuned / "report.json").read_text())["arms"]
    assert [arm["patch"] is not None for arm in arms] == [False, True]


def test_the_report_shows_tries_and_the_difference_over_training(tuned):
    report = json.loads((tuned / "report.json").read_text())
    (entry,) = report["trajectories"]
    assert entry["candidate"] == "crrelu" and [point["step"] for point in entry["points"]] == [1, 2, 3]
    for point in entry["points"]:
        losses = {
            arm: [
                next(log["eval_loss"] for log in run["history"] if log["step"] == point["step"] and "eval_loss" in log)
                for run in (run_of(tuned, arm, seed) for seed in (0, 1))
            ]
            for arm in ("native", "crrelu")
        }
        assert point["difference"] == pytest.approx(sum(losses["crrelu"]) / 2 - sum(losses["native"]) / 2)
        assert point["ci_low"] < point["difference"] < point["ci_high"] and point["n"] == 2
    page, text = (tuned / "report.html").read_text(), (tuned / "report.md").read_text()
    for shown in (page, text):
        assert "Tuning of each arm" in shown and "Difference in evaluation loss over training" in shown
        assert "is used for all seeds. Training took " in shown
    assert "over training</h3>" in page


def test_the_same_call_keeps_every_run_and_another_tune_is_refused(folder, tuned, capsys):
    times = {path: path.stat().st_mtime_ns for path in tuned.rglob("run.json") if '"done"' in path.read_text()}
    options = ("--patched_dir", str(folder / "copies"), "--output_dir", str(tuned))
    assert compare(folder, "--tune", f"learning_rate={','.join(RATES)}", *options) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    capsys.readouterr()
    assert compare(folder, "--tune", "learning_rate=1e-4,1e-3", *options) == 2
    assert "another comparison (different: tune)" in capsys.readouterr().err


def test_what_was_chosen_stays_chosen(folder, tuned):
    """Runs that are kept were trained with it."""
    path = tuned / "tuning" / tuning.CHOSEN
    chosen = json.loads(path.read_text())
    assert set(chosen) == {"native", "crrelu"}
    ((_, entry),) = tuning.read_tries(
        tuned, ["native"], [{}], [{"learning_rate": rate} for rate in RATES], "loss", True
    )
    assert entry.chosen == chosen["native"], "also where another try looks better now"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tune", "learning_rate=1e-4"), "--tune learning_rate=…: give two values or more"),
        (("--tune", "beta=0.1,1"), "--tune beta=…: cannot be tuned"),
        (("--patched_dir", __file__), "is a file; choose a directory"),
        (
            ("--arms", "native", "crrelu:layers=9"),
            "the arm crrelu:layers=9: layers: 9: the model has 2 layers",
        ),
        (("--after", "nowhere"), "is not a finished run; use the arms and seeds of that comparison"),
        (("--tune", "learning_rate"), "--tune: write key=value,value,…"),
        (("--tune", "max_steps=1,2", "--grid", "max_steps=1,2"), "--tune max_steps=…: --grid sets this key too"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, options, words):
    assert compare(folder, *options, "--output_dir", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_hold_out_takes_as_many_rows_as_are_tested_and_at_most_a_fifth():
    rows = Dataset.from_dict({"text": [str(i) for i in range(100)]})
    for tested, wanted in ((7, 7), (60, 20)):
        train, held_out = tuning.hold_out(rows, rows.select(range(tested)))
        assert len(held_out) == wanted and not set(train["text"]) & set(held_out["text"])
        assert len(train) == 100 - wanted and tuning.hold_out(rows, rows.select(range(tested)))[1][:] == held_out[:]
    for train in (rows.to_iterable_dataset(), rows.select(range(4))):
        with pytest.raises(InputError, match="--tune holds"):
            tuning.hold_out(train, rows)


def test_a_comparison_after_another_starts_each_run_from_its_own_model(tmp_path, tiny_checkpoint, capsys):
    """SFT, then DPO: each arm and seed goes on from what it became, and its reference is that."""
    workshop = Workshop(tmp_path, tiny_checkpoint)

    def run(kind, *options):
        values = workshop.values(kind, "unused", max_steps=2, learning_rate=1e-2)
        for key in ("activation", "output_dir", "seed"):
            del values[key]
        argv = ["compare", kind, "--config", write_recipe(tmp_path / f"{kind}.yaml", values)]
        return main([*argv, "--arms", "native", "crrelu", *options])

    first, second = tmp_path / "first", tmp_path / "second"
    assert run("sft", "--seeds", "0", "1", "--output_dir", str(first)) == 0
    assert run("dpo", "--seeds", "0", "1", "--after", str(first), "--output_dir", str(second)) == 0
    for arm in ("native", "crrelu"):
        for seed in (0, 1):
            begun, went_on = run_of(first, arm, seed), run_of(second, arm, seed)
            assert went_on["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
            assert went_on["epsilon_start"] == begun["epsilon"] and bool(begun["epsilon"]) == (arm == "crrelu")
            assert (second / arm / f"seed-{seed}" / "before.json").is_file()
    assert not list(second.rglob("patched"))
    third, tune = tmp_path / "third", ("--tune", "learning_rate=1e-3,1e-2")
    assert run("dpo", "--seeds", "1", "--after", str(first), *tune, "--output_dir", str(third)) == 0
    tried = run_of(third / "tuning", "crrelu/learning_rate=1e-3", tuning.SEED)
    assert tried["epsilon_start"] == run_of(first, "crrelu", 1)["epsilon"]
    capsys.readouterr()
    assert run("dpo", "--seeds", "0", "5", "--after", str(first), "--output_dir", str(tmp_path / "more")) == 2
    assert "seed-5 is not a finished run; use the arms and seeds of that comparison" in capsys.readouterr().err
    assert run("dpo", "--seeds", "0", "--output_dir", str(second)) == 2
    assert "another comparison (different: after)" in capsys.readouterr().err
