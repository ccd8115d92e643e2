"""The run matrix through `crrelu compare`: what it writes, keeps, resumes and refuses."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from runs import Workshop, dpo_rows, sft_rows, write_recipe

from crrelu_llm.cli.main import main
from crrelu_llm.comparison import settings
from crrelu_llm.comparison.arms import directory_name
from crrelu_llm.files import alone

ARMS = ["native", "crrelu", "crrelu:calibration=fit"]
pytestmark = pytest.mark.usefixtures("sketched")  # the first comparison below has its pictures


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny_checkpoint, text_file):
    """A folder with data and a recipe for both trainers."""
    made = Workshop(tmp_path_factory.mktemp("compare"), tiny_checkpoint)
    made.calibration = {"calibration_tokens": 2048, "calibration_data": str(text_file)}
    return made


def recipe(workshop, kind, **options):
    """A recipe of two steps without an activation section; returns its path."""
    values = workshop.values(kind, "unused", max_steps=2, **workshop.calibration, **options)
    del values["activation"], values["output_dir"], values["seed"]
    return write_recipe(workshop.folder / f"compare-{kind}.yaml", values)


def compare(workshop, kind, output_dir, arms, *options, seeds=("0", "1")):
    """Exit status of `crrelu compare`."""
    argv = ["compare", kind, "--config", recipe(workshop, kind), "--arms", *arms, "--seeds", *seeds]
    return main([*argv, "--output_dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def sft(workshop):
    """A finished SFT comparison of three arms and two seeds."""
    directory = workshop.folder / "sft-comparison"
    assert compare(workshop, "sft", directory, ARMS) == 0
    return directory


def read(directory):
    """report.json of a comparison."""
    return json.loads((directory / "report.json").read_text())


def test_every_arm_and_seed_is_there(sft):
    for arm in ARMS:
        for seed in (0, 1):
            run = json.loads((sft / directory_name(arm) / f"seed-{seed}" / "run.json").read_text())
            assert run["status"] == "done" and run["seed"] == seed and run["steps"] == 2
            assert (sft / directory_name(arm) / f"seed-{seed}" / "model.safetensors").is_file()
    assert {path.name for path in sft.glob("report.*")} == {"report.html", "report.md", "report.json"}


def test_the_report_follows_the_contract(sft):
    report = read(sft)
    assert [arm["arm"] for arm in report["arms"]] == ARMS
    for arm in report["arms"]:
        assert math.isfinite(arm["before"]["perplexity"])
        for run in arm["runs"]:
            assert set(run["metrics"]) == {"loss", "perplexity", "token_accuracy"}
            assert run["train_seconds"] > 0 and run["tokens_per_second"] > 0 and run["peak_memory_bytes"] > 1e7
            assert bool(run["epsilon"]) == (arm["activation"] == "crrelu")
    assert report["baseline"] == "native"
    assert {(entry["candidate"], entry["metric"], entry["unit"]) for entry in report["comparisons"]} >= {
        ("crrelu", "loss", "seed"),
        ("crrelu", "loss", "item"),
        ("crrelu:calibration=fit", "token_accuracy", "item"),
        ("crrelu", "perplexity", "seed"),
    }
    assert [entry["rows"] for entry in report["data"]] == [16, 8]
    assert all(len(entry["sha256"]) == 64 for entry in report["data"])
    items = [entry for entry in report["comparisons"] if entry["unit"] == "item"]
    assert {entry["n"] for entry in items} == {8}


def test_examples_are_documents_with_the_mean_of_the_seeds(sft):
    report, seeds, documents = read(sft), (0, 1), [row["text"] for row in sft_rows(8, seed=2)]
    assert {entry["candidate"] for entry in report["examples"]} == {arm["arm"] for arm in report["arms"][1:]}
    for entry in report["examples"]:
        losses = [
            [
                json.loads((sft / directory_name(arm) / f"seed-{seed}" / "run.json").read_text())["items"]["loss"][
                    entry["item"]
                ]
                for seed in seeds
            ]
            for arm in (entry["baseline"], entry["candidate"])
        ]
        means = [sum(values) / len(seeds) for values in losses]
        assert entry["values"] == pytest.approx(means)
        assert entry["outcome"] == ("better" if means[1] < means[0] else "worse")
        assert documents[entry["item"]] in entry["prompt"] and entry["options"] == []


def test_arms_start_from_their_own_patch(sft):
    native, naive, fitted = read(sft)["arms"]
    assert native["patch"] is None and naive["patch"]["options"]["calibration"] == "none"
    assert all(site["epsilon_mean"] == pytest.approx(0.01) for site in naive["patch"]["sites"])
    assert all(site["relative_error"] < 1 for site in fitted["patch"]["sites"])
    starts = {site["path"]: site["epsilon_mean"] for site in fitted["patch"]["sites"]}
    assert fitted["runs"][0]["epsilon_start"] == fitted["runs"][1]["epsilon_start"] == pytest.approx(starts)
    assert len({arm["before"]["loss"] for arm in (native, naive, fitted)}) == 3


def test_a_run_is_what_crrelu_sft_gives(sft, workshop):
    """The evaluation before training, and the runs before it in the same process, change nothing."""
    single = workshop.run("sft", "single", max_steps=2, seed=1, **workshop.calibration)
    run = json.loads((sft / "crrelu" / "seed-1" / "run.json").read_text())
    assert [entry["loss"] for entry in run["history"]] == [entry["loss"] for entry in single["history"]]
    assert run["epsilon"] == single["epsilon"]


def test_finished_runs_are_kept_and_missing_ones_are_made(sft, workshop, capsys):
    directory = workshop.folder / "interrupted"
    shutil.copytree(sft, directory)
    shutil.rmtree(directory / "crrelu" / "seed-1")
    (directory / "report.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in directory.rglob("run.json")}
    assert compare(workshop, "sft", directory, ARMS) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.endswith(": kept") for line in lines) == 5
    assert sum(line.endswith(": training") for line in lines) == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    again, first = read(directory), read(sft)
    for old, new in zip(first["arms"], again["arms"], strict=True):
        assert [run["metrics"] for run in old["runs"]] == [run["metrics"] for run in new["runs"]]


def test_a_run_that_diverged_is_compared_with_nothing(sft, workshop):
    """Its numbers are null in JSON."""
    directory = workshop.folder / "diverged"
    shutil.copytree(sft, directory)
    path = directory / "crrelu" / "seed-1" / "run.json"
    run = json.loads(path.read_text())
    run["metrics"] = dict.fromkeys(run["metrics"])
    run["items"] = {name: [None] * len(values) for name, values in run["items"].items()}
    path.write_text(json.dumps(run))
    assert main(["report", str(directory)]) == 0
    entries = read(directory)["comparisons"]
    assert {entry["verdict"] for entry in entries if entry["candidate"] == "crrelu"} == {"undecided"}
    broken = [entry["note"] for entry in entries if entry["candidate"] == "crrelu" and entry["unit"] == "item"]
    assert broken and all("not a finite number" in note for note in broken)
    others = [entry for entry in entries if entry["candidate"] != "crrelu"]
    assert all(entry["difference"] is not None for entry in others)


def test_arms_and_seeds_can_be_added_later_and_the_baseline_stays(sft, workshop):
    directory = workshop.folder / "extended"
    shutil.copytree(sft, directory)
    assert compare(workshop, "sft", directory, ["relu"], seeds=("0",)) == 0
    report = read(directory)
    assert [arm["arm"] for arm in report["arms"]] == [*ARMS, "relu"]
    assert [(run["seed"], run["status"]) for run in report["arms"][-1]["runs"]] == [(0, "done")]
    assert report["baseline"] == "native" and len(report["command"].splitlines()) == 2
    assert {entry["baseline"] for entry in report["comparisons"]} == {"native"}
    first = [entry for entry in read(sft)["comparisons"] if entry["unit"] == "item"]
    kept = [entry for entry in report["comparisons"] if entry["unit"] == "item" and entry["candidate"] != "relu"]
    assert [entry["difference"] for entry in kept] == [entry["difference"] for entry in first]


@pytest.mark.slow
def test_a_grid_over_the_patch_has_checkpoints_and_metrics_of_its_own(workshop):
    directory = workshop.folder / "patch-grid"
    options = ["--grid", "epsilon_init=0.01,5", "--discard_models"]
    assert compare(workshop, "sft", directory, ["native", "crrelu"], *options, seeds=("0",)) == 0
    native, crrelu = read(directory)["arms"]
    assert len({run["before"]["loss"] for run in native["runs"]}) == 1
    assert len({run["before"]["loss"] for run in crrelu["runs"]}) == 2
    starts = [list(run["epsilon_start"].values()) for run in crrelu["runs"]]
    assert starts == [pytest.approx([0.01, 0.01]), [5.0, 5.0]]


def test_a_run_killed_while_it_saved_goes_on_from_the_last_whole_checkpoint(workshop):
    directory = workshop.folder / "killed"
    save = ["--save_strategy", "steps", "--save_steps", "1"]
    assert compare(workshop, "sft", directory, ["crrelu"], *save, seeds=("0",)) == 0
    place = directory / "crrelu" / "seed-0"
    whole = json.loads((place / "run.json").read_text())
    (place / "run.json").unlink()
    (place / "checkpoint-2" / "trainer_state.json").unlink()  # written last: the kill came before
    assert compare(workshop, "sft", directory, ["crrelu"], *save, seeds=("0",)) == 0
    again = json.loads((place / "run.json").read_text())
    assert again["metrics"] == whole["metrics"] and again["epsilon"] == whole["epsilon"]
    assert again["resumed"] and again["train_seconds"] is None and not whole["resumed"]


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "sft"}'])
def test_damaged_settings_are_one_line(tmp_path, capsys, content):
    (tmp_path / "comparison.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "comparison.json" in error and error.count("\n") == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("comparison.json", None),
        ("crrelu/seed-0/run.json", '{"status": "do'),
        ("crrelu/seed-0/run.json", "[1]"),
        ("crrelu/seed-0/run.json", '{"status": "done", "items": {"loss": ["a"]}}'),
        ("crrelu/before.json", "{"),
        ("crrelu/patched/patch_report.json", "{"),
        ("texts.json", '[{"prompt": 1}]'),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(sft, tmp_path, capsys, file, content):
    directory = tmp_path / "damaged"
    shutil.copytree(sft, directory)
    path = directory / file
    if content is None:
        content = json.dumps(json.loads(path.read_text()) | {"kind": "sfd"})
    assert path.is_file()
    path.write_text(content)
    assert main(["report", str(directory)]) == 2
    error = capsys.readouterr().err.strip()
    assert str(path) in error and error.count("\n") == 0


def test_secrets_are_not_published(workshop):
    directory = workshop.folder / "secret"
    assert compare(workshop, "sft", directory, ["native"], "--hub_token", "hunter2", seeds=("0",)) == 0
    texts = [path.read_text() for pattern in ("*.json", "*.md", "*.html") for path in directory.rglob(pattern)]
    assert texts and not any("hunter2" in text for text in texts)


def test_another_recipe_is_refused_and_nothing_is_lost(sft, workshop, capsys):
    before = {path: path.read_bytes() for path in sft.rglob("*.json")}
    assert compare(workshop, "sft", sft, ARMS, "--learning_rate", "0.5") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "already holds another comparison (different: learning_rate)" in error
    assert {path: path.read_bytes() for path in sft.rglob("*.json")} == before


def test_more_processes_are_another_comparison(sft, workshop, monkeypatch, capsys):
    monkeypatch.setattr(settings, "PartialState", lambda: SimpleNamespace(num_processes=2))
    assert compare(workshop, "sft", sft, ARMS) == 2
    assert "already holds another comparison (different: num_processes)" in capsys.readouterr().err


def test_a_directory_with_something_else_is_refused(workshop, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert compare(workshop, "sft", tmp_path, ARMS) == 2
    assert "has other files, and no comparison; choose a new or empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_calls_at_once_in_one_directory_are_refused(sft, workshop, capsys):
    before = {path: path.read_bytes() for path in sft.rglob("*.json")}
    with alone(sft, "crrelu compare"):
        assert compare(workshop, "sft", sft, [*ARMS, "relu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another `crrelu compare` is at work there" in error
    assert {path: path.read_bytes() for path in sft.rglob("*.json")} == before


def test_report_is_rebuilt_from_disk(sft, workshop, capsys):
    directory = workshop.folder / "rebuilt"
    shutil.copytree(sft, directory)
    for path in directory.glob("report.*"):
        path.unlink()
    assert main(["report", str(directory)]) == 0
    assert read(directory)["comparisons"] == read(sft)["comparisons"]
    assert main(["report", str(workshop.folder)]) == 2
    assert "holds no comparison" in capsys.readouterr().err


def test_dpo_with_a_grid_and_discarded_models(workshop):
    directory = workshop.folder / "dpo-comparison"
    options = ["--grid", "beta=0.1,2", "--discard_models"]
    assert compare(workshop, "dpo", directory, ["gelu", "crrelu"], *options, seeds=("0",)) == 0
    report = read(directory)
    assert not list(directory.glob("*/*/seed-0/model.safetensors"))
    for arm in report["arms"]:
        assert [run["grid"] for run in arm["runs"]] == [{"beta": 0.1}, {"beta": 2}]
        assert arm["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert arm["before"]["reward_margin"] == pytest.approx(0, abs=1e-4)
        for run in arm["runs"]:
            assert set(run["metrics"]) == {
                *("loss", "reward_accuracy", "reward_margin", "perplexity"),
                *("longer_answer_accuracy", "length_correlation"),
            }
    assert {entry["grid"]["beta"] for entry in report["comparisons"]} == {0.1, 2}
    assert {entry["grid"]["beta"] for entry in report["examples"]} == {0.1, 2}
    rows = dpo_rows(8, seed=2)
    for entry in report["examples"]:
        row, (chosen, rejected) = rows[entry["item"]], entry["options"]
        assert row["prompt"] in entry["prompt"]
        assert row["chosen"] in chosen["text"] and row["rejected"] in rejected["text"]
        assert chosen["right"] and not rejected["right"]
    assert not any(entry["metric"] == "longer_answer_accuracy" for entry in report["comparisons"])
    assert any(entry["test"] == "mcnemar" for entry in report["comparisons"])


def test_one_failing_run_does_not_take_the_others_with_it(workshop, monkeypatch, capsys):
    from crrelu_llm.comparison import matrix

    directory = workshop.folder / "failing"
    build = matrix.build_trainer

    def fail_for_relu(recipe, *args):
        if recipe.activation.activation == "relu":
            raise RuntimeError("out of memory")
        return build(recipe, *args)

    monkeypatch.setattr(matrix, "build_trainer", fail_for_relu)
    assert compare(workshop, "sft", directory, ["relu", "native"], "--baseline", "native", seeds=("0",)) == 1
    assert "1 of 2 runs failed" in capsys.readouterr().err
    status = {arm["arm"]: arm["runs"][0]["status"] for arm in read(directory)["arms"]}
    assert status == {"relu": "failed", "native": "done"}
    assert read(directory)["arms"][0]["runs"][0]["error"] == "RuntimeError: out of memory"
    monkeypatch.undo()
    assert compare(workshop, "sft", directory, ["relu", "native"], "--baseline", "native", seeds=("0",)) == 0


@pytest.mark.parametrize(
    "change, wrong",
    [
        (["--arms", "gelu", "crelu"], "unknown activation"),
        (["--seeds", "0", "0"], "different whole numbers"),
        (["--seeds", "-1"], "of 0 or more"),
        (["--grid", "seed=1,2"], "--grid seed"),
        (["--grid", "beta"], "--grid"),
        (["--grid", "betta=1,2"], "betta"),
        (["--baseline", "mish"], "--baseline"),
        (["--learning_rat", "1"], "learning_rat"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--model_name_or_path", "./absent"], "absent"),
        (["--dataset_test_split", "dev"], "dev"),
        (["--dataset_test_split", "train"], "share rows"),
        (["--shuffle_dataset", "true"], "another order"),
        (["--grid", "num_train_epochs=1,2"], "--grid num_train_epochs=…: no effect beside max_steps"),
        (["--tune", "num_train_epochs=1,2"], "--tune num_train_epochs=…: no effect beside max_steps"),
        (["--eval_packing", "true"], "eval_packing without packing"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(workshop, tmp_path, capsys, change, wrong):
    argv = ["compare", "sft", "--config", recipe(workshop, "sft"), "--output_dir", str(tmp_path / "out")]
    argv += [*(["--arms", "gelu", "crrelu"] if "--arms" not in change else []), *change]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert wrong in error and error.count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_arms_blend(workshop, kind, tmp_path):
    arms = ["native", "crrelu", "crrelu:blend_steps=2", "relu:blend_steps=1:blend_schedule=cosine"]
    assert compare(workshop, kind, tmp_path / "out", arms, seeds=["0"]) == 0
    report = {arm["arm"]: arm for arm in read(tmp_path / "out")["arms"]}
    history = {
        arm: json.loads((tmp_path / "out" / directory_name(arm) / "seed-0" / "run.json").read_text())["history"]
        for arm in arms
    }
    first = {arm: entries[0]["loss"] for arm, entries in history.items()}
    assert first[arms[2]] == pytest.approx(first["native"], abs=1e-6)
    assert first[arms[3]] == pytest.approx(first["native"], abs=1e-6)
    # Right after the swap: the plain swap's own number, blended or not.
    assert report[arms[2]]["before"]["perplexity"] == report["crrelu"]["before"]["perplexity"]


def test_a_blend_longer_than_the_training_is_refused_before_any_run(workshop, tmp_path, capsys):
    assert compare(workshop, "sft", tmp_path / "out", ["native", "crrelu:blend_steps=3"], seeds=["0"]) == 2
    assert "blend_steps must be at most the number of training steps, 2, not 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_recipe_that_distils_does_so_in_every_arm(workshop, tmp_path):
    argv = ["--config", recipe(workshop, "sft", distill_weight=0.5), "--arms", "native", "crrelu", "--seeds", "0"]
    assert main(["compare", "sft", *argv, "--output_dir", str(tmp_path / "out")]) == 0
    for arm in ("native", "crrelu"):
        run = json.loads((tmp_path / "out" / directory_name(arm) / "seed-0" / "run.json").read_text())
        assert all("distill_kl" in entry for entry in run["history"] if "loss" in entry)


def test_a_rebuilt_report_takes_the_margin_that_is_given(sft, workshop, capsys):
    directory = workshop.folder / "margin"
    shutil.copytree(sft, directory)
    assert main(["report", str(directory), "--margin", "loss=100", "perplexity=0.5"]) == 0
    margins = {(entry["metric"], entry["equivalence_margin"]) for entry in read(directory)["comparisons"]}
    assert margins == {("loss", 100.0), ("perplexity", 0.5), ("token_accuracy", 0.01)}
    capsys.readouterr()
    assert main(["report", str(directory), "--margin", "accuracy=0.1"]) == 2
    assert "--margin accuracy:" in capsys.readouterr().err
