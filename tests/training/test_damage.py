"""Damaged checkpoints, full and read-only disks: one line that says what is safe, and nothing good is lost."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from crash import Children
from runs import LORA, losses, write_recipe
from safetensors.torch import load_file

from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.training.resume import FILES, checkpoints, fault_of, last_checkpoint, tidy
from crrelu_llm.training.run import _SPEEDS, run_recipe
from crrelu_llm.training.saving import rotate

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def cut(file):
    """Keeps the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "model.safetensors has": lambda path: cut(path / "model.safetensors"),
    "optimizer.pt has": lambda path: cut(path / "optimizer.pt"),
    "scheduler.pt is missing": lambda path: (path / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda path: (path / "rng_state.pth").unlink(),
    "trainer_state.json is damaged": lambda path: (path / "trainer_state.json").write_text(""),
    "trainer_state.json is damaged)": lambda path: cut(path / "trainer_state.json"),
    "checkpoint_files.json is damaged": lambda path: cut(path / FILES),
}


def test_a_damaged_checkpoint_is_one_line_that_names_the_last_good_one(workshop, capsys):
    argv = workshop.argv("sft", "run", **SAVING)
    whole = run_recipe("sft", argv)
    output = workshop.folder / "run"
    good, newest = output / "checkpoint-2", output / "checkpoint-4"
    shutil.copytree(newest, workshop.folder / "undamaged")
    for fault, damage in DAMAGE.items():
        shutil.rmtree(newest)
        shutil.copytree(workshop.folder / "undamaged", newest)
        damage(newest)
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        for wanted in ("true", str(newest)):
            capsys.readouterr()
            assert main(["sft", *argv, "--resume_from_checkpoint", wanted]) == 2
            line = capsys.readouterr().err.strip()
            assert line.startswith(f"crrelu sft: resume_from_checkpoint: {newest} is not a whole checkpoint ({fault}")
            assert line.endswith(f"resume from {good} instead") and "\n" not in line
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    resumed = run_recipe("sft", [*argv, "--resume_from_checkpoint", "auto"])
    assert losses(resumed) == losses(whole)
    assert fault_of(newest) is None


def test_checkpoints_of_plain_trl_are_judged_by_their_parts(workshop):
    workshop.run("sft", "run", **SAVING)
    path = workshop.folder / "run" / "checkpoint-4"
    (path / FILES).unlink()
    assert fault_of(path) is None
    for name, fault in (
        ("scheduler.pt", "no scheduler.pt"),
        ("rng_state.pth", "no rng_state.pth"),
        ("optimizer.pt", "no optimizer"),
    ):
        (path / name).rename(path.parent / name)
        assert fault_of(path) == fault
        (path.parent / name).rename(path / name)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        content = (path / name).read_bytes()
        cut(path / name)
        assert fault_of(path) == f"{name} is cut off or damaged"
        (path / name).write_bytes(content)
    assert fault_of(path) is None
    (path / "trainer_state.json").unlink()
    assert fault_of(path) == "no trainer_state.json"


def test_auto_starts_where_there_is_nothing_and_passes_over_what_is_damaged(workshop, caplog):
    argv = [*workshop.argv("sft", "run", **SAVING), "--resume_from_checkpoint", "auto"]
    first = run_recipe("sft", argv)
    assert not first["resumed"]
    output = workshop.folder / "run"
    cut(output / "checkpoint-4" / "optimizer.pt")
    caplog.clear()
    assert last_checkpoint(output) == str(output / "checkpoint-2")
    assert "checkpoint-4 is not a whole checkpoint (optimizer.pt has" in caplog.text
    second = run_recipe("sft", argv)
    assert second["resumed"] and losses(second) == losses(first)


def test_where_no_checkpoint_is_whole_the_line_says_so(workshop):
    argv = workshop.argv("sft", "run", **SAVING)
    run_recipe("sft", argv)
    for path in checkpoints(workshop.folder / "run"):
        cut(path / "optimizer.pt")
    with pytest.raises(
        InputError, match=r"checkpoint-4 is not a whole checkpoint .*has no whole one; start without it"
    ):
        run_recipe("sft", [*argv, "--resume_from_checkpoint", "true"])


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_a_resume_from_the_last_step_trains_no_more(workshop, options):
    argv = workshop.argv("sft", "run", **SAVING, logging_steps=3, **options)
    whole = run_recipe("sft", argv)
    name = "adapter_model.safetensors" if options else "model.safetensors"
    weights = load_file(workshop.folder / "run" / name)
    again = run_recipe("sft", [*argv, "--resume_from_checkpoint", "true"])
    assert again["steps"] == 4 and again["epsilon"] == whole["epsilon"]
    assert again["metrics"] == {key: value for key, value in whole["metrics"].items() if key not in _SPEEDS}
    assert "entropy" in again["metrics"]
    assert all(torch.equal(value, weights[key]) for key, value in load_file(workshop.folder / "run" / name).items())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_first_log_line_after_a_resume_is_the_uninterrupted_one(workshop, kind):
    """With a checkpoint between two lines of the log, whose sums it has to bring back."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = workshop.run(kind, "whole", **options)
    checkpoint = str(workshop.folder / "whole" / "checkpoint-2")
    again = workshop.run(kind, "again", **options, resume_from_checkpoint=checkpoint)
    assert again["history"] == whole["history"] and len(whole["history"]) == 2
    assert again["metrics"]["train_loss"] == whole["metrics"]["train_loss"]


def fake(directory, *steps):
    """Directories that look like checkpoints."""
    for step in steps:
        (directory / f"checkpoint-{step}").mkdir(parents=True)
        (directory / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 1}')


@pytest.mark.parametrize(
    "newest, limit, best, left",
    [
        (30, None, None, [10, 20, 30, 90]),
        (30, 4, None, [10, 20, 30, 90]),
        (30, 2, None, [20, 30]),
        (30, 1, None, [30]),
        (30, 1, 10, [10, 30]),
        (10, 1, None, [10]),  # of a new run, in the directory of an earlier one
        (30, 2, 90, [30, 90]),
    ],
)
def test_what_save_total_limit_deletes(tmp_path, newest, limit, best, left):
    fake(tmp_path, 10, 20, 30, 90)
    rotate(tmp_path / f"checkpoint-{newest}", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.iterdir()) == left


def test_leftovers_go_and_a_checkpoint_that_was_moved_aside_comes_back(tmp_path):
    fake(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old.tmp")
    fake(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / ".checkpoint-4.old.tmp")
    (tmp_path / ".saving.tmp" / "checkpoint-6").mkdir(parents=True)
    (tmp_path / ".run.json.123.tmp").write_text("{")
    (tmp_path / ".mine.tmp").write_text("mine")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "checkpoint-2", "checkpoint-4"]


def test_the_best_checkpoint_has_its_own_name(workshop):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    workshop.run("sft", "run", **SAVING, **options, metric_for_best_model="loss")
    output = workshop.folder / "run"
    for path in checkpoints(output):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(output / f"checkpoint-{state['best_global_step']}")
        assert fault_of(path) is None
    assert not list(output.glob(".*"))


@pytest.fixture
def disk(tmp_path):
    """A small file system where mounting is permitted, else a plain folder; and whether it is one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mounted = (
        mounted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    yield folder, bool(mounted)
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """What starts commands whose files may not grow beyond a limit."""
    return Children(tmp_path_factory.mktemp("children"))


def fill(folder, leave):
    """Fills a file system but for so many bytes."""
    free = shutil.disk_usage(folder).free
    (folder / "filling").write_bytes(bytes(max(0, free - leave)))


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_full_disk_while_a_checkpoint_is_written(workshop, children, disk, part):
    folder, mounted = disk
    argv = [*workshop.argv("sft", "run", **SAVING | {"max_steps": 2}), "--output_dir", str(folder / "run")]
    status, _, _, log = children.run(["sft", *argv])
    assert status == 0, log
    good = folder / "run" / "checkpoint-2"
    weights, optimizer = ((good / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    room = weights // 2 if part == "weights" else (weights + optimizer) // 2
    argv += ["--max_steps", "4", "--resume_from_checkpoint", "auto"]
    if mounted:
        fill(folder, room if part == "weights" else weights + 200_000)
    status, _, _, log = children.run(["sft", *argv], limit=0 if mounted else room)
    line = log.strip().splitlines()[-1]
    assert "Traceback" not in log, log
    if mounted and part == "weights":  # not even room for the trained model: seen before the first step
        assert status == 2 and line.endswith("choose another output_dir, or make room")
    else:
        assert status == 1 and line.startswith(f"crrelu sft: {folder / 'run' / 'checkpoint-4'} could not be written: ")
        assert line.endswith(f"{good} is safe; add --resume_from_checkpoint {good} to go on")
    assert checkpoints(folder / "run") == [good] and fault_of(good) is None
    assert not list((folder / "run").glob(".*"))
    if mounted:
        (folder / "filling").unlink()
    status, _, _, log = children.run(["sft", *argv])
    assert status == 0, log
    assert checkpoints(folder / "run")[0].name == "checkpoint-4"


def test_a_limit_on_file_sizes_is_a_full_disk(workshop, children):
    """The same where nothing can be mounted: always run."""
    argv = ["sft", *workshop.argv("sft", "run", **SAVING, resume_from_checkpoint="auto")]
    status, _, _, log = children.run([*argv, "--max_steps", "2"])
    assert status == 0, log
    output = workshop.folder / "run"
    size = (output / "checkpoint-2" / "model.safetensors").stat().st_size
    status, _, _, log = children.run(argv, limit=size + 1000)  # the weights fit, the optimiser does not
    line = log.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in log, log
    assert "checkpoint-4 could not be written: the disk is full, or a limit on file sizes is reached; " in line
    assert line.endswith(f"{output / 'checkpoint-2'} to go on")
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("what", ["patched copy", "final model"])
def test_a_full_disk_elsewhere_in_a_run(workshop, children, what):
    options = {"max_steps": 1} if what == "patched copy" else {"max_steps": 1, "activation": None}
    argv = ["sft", *workshop.argv("sft", "run", **options)]
    status, _, _, log = children.run(argv, limit=100_000)
    line = log.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in log, log
    assert "could not be written: file too large; " in line and line.startswith("crrelu sft: ")
    left = [path.name for path in (workshop.folder / "run").glob("*")]  # the directory itself may not be there
    assert not [name for name in left if name.endswith(".safetensors") or name.startswith(".") or name == "patched"]
    status, _, _, log = children.run(argv)
    assert status == 0, log


def test_a_full_disk_stops_a_comparison_with_one_line(workshop, children):
    values = workshop.values("sft", "unused", max_steps=1)
    del values["activation"], values["output_dir"], values["seed"]
    recipe = write_recipe(workshop.folder / "compare.yaml", values)
    argv = ["compare", "sft", "--config", recipe, "--arms", "native", "relu", "--seeds", "0"]
    argv += ["--output_dir", str(workshop.folder / "out")]
    status, _, _, log = children.run(argv, limit=100_000)
    line = log.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in log, log
    assert line.startswith("crrelu compare: the trained model in ") and "could not be written: file too large" in line
    assert line.endswith("0 of 2 runs are finished and kept; run the same command again to go on")
    status, _, _, log = children.run(argv)
    assert status == 0, log


@contextlib.contextmanager
def read_only(folder, mounted):
    """Makes a folder one that really refuses; says whether it could."""
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield not os.access(folder, os.W_OK)
    finally:
        if mounted:
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        else:
            folder.chmod(0o755)


def test_a_directory_that_cannot_be_written(workshop, disk, capsys):
    folder, mounted = disk
    (workshop.folder / "file").write_text("mine")
    with read_only(folder, mounted) as refuses:
        # Below a file nobody can write, also not root where mounting is not permitted.
        for place in [workshop.folder / "file", *([folder] if refuses else [])]:
            argv = [*workshop.argv("sft", "run"), "--output_dir", str(place / "run")]
            assert main(["sft", *argv]) == 2
            line = capsys.readouterr().err.strip()
            assert f"output_dir {place / 'run'}: cannot write in {place}; choose another" in line and "\n" not in line


def test_a_disk_that_becomes_read_only(workshop, disk, capsys, monkeypatch):
    """The check at the start passes, the first write fails."""
    folder, mounted = disk
    from crrelu_llm.training import arguments

    monkeypatch.setattr(arguments.os, "access", lambda path, mode: True)
    place = folder if mounted else workshop.folder / "gone"
    with read_only(folder, mounted) if mounted else contextlib.nullcontext():
        if not mounted:  # a file where a directory has to be made
            monkeypatch.setattr(arguments, "_check", lambda *args: None)
            place.write_text("mine")
        argv = [*workshop.argv("sft", "run", max_steps=1), "--output_dir", str(place / "run")]
        assert main(["sft", *argv]) == 1
    captured = capsys.readouterr().err
    assert "could not be written: " in captured.strip().splitlines()[-1] and "Traceback" not in captured
