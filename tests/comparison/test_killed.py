"""A comparison that is killed, run again, ends with the report of one that nobody kills."""

import json
import random
import shutil
import time
from collections import Counter

import pytest
from crash import PHASES, Children, bits
from runs import Workshop, write_recipe

ARMS = ["native", "crrelu:calibration=fit"]
TIMES = {"train_seconds", "tokens_per_second", "peak_memory_bytes", "resumed", "history"}


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """What starts and kills commands."""
    return Children(tmp_path_factory.mktemp("children"))


@pytest.fixture
def workshop(tiny_checkpoint, tmp_path):
    """A folder with data and recipes."""
    return Workshop(tmp_path, tiny_checkpoint)


def command(workshop, kind, name, text_file, *options):
    """The command line of a comparison of two arms and its directory."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 1, "max_steps": 4}
    values = workshop.values(kind, "unused", **saving, calibration_tokens=512, calibration_data=str(text_file))
    del values["activation"], values["output_dir"], values["seed"]
    recipe = write_recipe(workshop.folder / f"{kind}.yaml", values)
    argv = ["compare", kind, "--config", recipe, "--arms", *ARMS, "--seeds", "0", "1", *options]
    return [*argv, "--output_dir", str(workshop.folder / name)], workshop.folder / name


def outcome(directory):
    """What a comparison found, exactly, without the times."""
    report = json.loads((directory / "report.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(directory.rglob("run.json"))]
    assert len(runs) == 4 and {run["status"] for run in runs} == {"done"}
    arms = []
    for arm in report["arms"]:
        for key in ("seconds", "calibration"):  # what the patch took
            (arm["patch"] or {}).pop(key, None)
        rows = [{key: run[key] for key in run.keys() - TIMES} for run in arm["runs"]]
        arms.append({**{key: arm[key] for key in arm.keys() - TIMES}, "runs": rows})
    kept = [{key: run[key] for key in ("metrics", "items", "epsilon", "history", "seed")} for run in runs]
    return bits({"comparisons": report["comparisons"], "arms": arms, "runs": kept})


def stamps(directory):
    """When each finished run was finished."""
    found = {path: path.stat().st_mtime_ns for path in directory.rglob("run.json")}
    return {path: stamp for path, stamp in found.items() if json.loads(path.read_text())["status"] == "done"}


def go_on(children, argv, directory, **kill):
    """One more call of a comparison; finished runs must not be done again. Returns its exit status and phase."""
    before = stamps(directory)
    status, phase, _, log = children.run(argv, **kill)
    assert status in (0, -9), log
    assert before.items() <= stamps(directory).items()
    return status, phase


def test_killed_at_some_writes(children, workshop, text_file):
    argv, whole = command(workshop, "sft", "whole", text_file)
    status, _, writes, log = children.run(argv)
    assert status == 0, log
    argv, directory = command(workshop, "sft", "killed", text_file)
    for at in range(writes // 6, writes, writes // 3):
        status, _ = go_on(children, argv, directory, kill_at=at)
        if status == 0:
            break
    status, _ = go_on(children, argv, directory)
    assert status == 0
    assert outcome(directory) == outcome(whole)
    assert [path.name for path in directory.rglob(".*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [("sft", []), ("dpo", ["--discard_models"])])
def test_killed_at_random_moments(children, workshop, text_file, kind, options):
    argv, whole = command(workshop, kind, "whole", text_file, *options)
    for _ in range(2):  # the first also starts the server and fills the cache
        shutil.rmtree(whole, ignore_errors=True)
        begun = time.monotonic()
        assert children.run(argv)[0] == 0
        seconds = time.monotonic() - begun
    generator, kills, attempt = random.Random(kind), Counter(), 0
    while kills.total() < 30:
        attempt += 1
        argv, directory = command(workshop, kind, f"killed-{attempt}", text_file, *options)
        status = -9
        while status != 0:
            begun = time.monotonic()
            status, phase = go_on(children, argv, directory, kill_after=generator.uniform(0.05, 0.6) * seconds)
            kills[phase] += status != 0
            if status == 0:  # the machine may have become faster
                seconds = min(seconds, 2 * (time.monotonic() - begun))
        assert outcome(directory) == outcome(whole)
        assert not options or not list(directory.rglob("checkpoint-*"))
        shutil.rmtree(directory)
    where = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES if kills[phase])
    print(f"KILLS comparison, {kind}, at random, {attempt} comparisons: {kills.total()} ({where}); all bits equal")
