"""SIGKILL at any moment, also in the middle of a write: the command run again ends as if nothing had happened."""

import itertools
import json
import random
import shutil
import time
from collections import Counter

import pytest
import torch
from crash import PHASES, Children, bits
from runs import LORA, Workshop
from safetensors.torch import load_file

from crrelu_llm.training.resume import checkpoints, fault_of
from crrelu_llm.training.run import _SPEEDS

SAVING = {
    "max_steps": 10,  # more than an epoch, which has 8
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
    "logging_steps": 3,
    "resume_from_checkpoint": "auto",
    "epsilon_learning_rate": 0.01,
    "epsilon_weight_decay": 0.1,
    "calibration": "fit",
    "calibration_tokens": 1024,
    "blend_steps": 6,
}
DISTILLED = {"distill_weight": 0.5, "calibration": "refit", "blend_steps": 0, "epsilon_per": "channel"}
CASES = {
    "sft-full": ("sft", {"logging_steps": 1}),
    "sft-lora": ("sft", LORA),
    "sft-distilled": ("sft", DISTILLED),
    "dpo-full": ("dpo", {"save_total_limit": 2}),
    "dpo-lora": ("dpo", LORA | {"logging_steps": 1}),
    "kto-full": ("kto", {}),
    "reward-full": ("reward", {}),
    "grpo-full": ("grpo", {"blend_steps": 0}),
    "rloo-full": ("rloo", {"blend_steps": 0}),
}
KILLS = dict.fromkeys(("kto-full", "reward-full", "grpo-full", "rloo-full"), 10)  # at random; of the others 50
TIMES = {"step_time"}  # what GRPO and RLOO log of a step, beside what it computed


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """What starts and kills commands."""
    return Children(tmp_path_factory.mktemp("children"))


@pytest.fixture
def workshop(tiny_checkpoint, tmp_path):
    """A folder with data and recipes."""
    return Workshop(tmp_path, tiny_checkpoint)


def command(workshop, case, name, text_file):
    """A case's command line and the directory that it writes."""
    kind, options = CASES[case]
    argv = workshop.argv(kind, name, **{**SAVING, "calibration_data": str(text_file), **options})
    return [kind, *argv], workshop.folder / name


def outcome(directory):
    """All that must not depend on where a run was killed: losses, ε, weights, optimiser and random states, exactly."""
    run = json.loads((directory / "run.json").read_text())
    last = checkpoints(directory)[0]
    name = "adapter_model.safetensors" if (directory / "adapter_config.json").is_file() else "model.safetensors"
    found = {key: bits(run[key]) for key in ("status", "epsilon", "epsilon_start", "steps")}
    found["history"] = bits(without_times(run["history"]))
    found["metrics"] = bits({key: value for key, value in run["metrics"].items() if key not in {*_SPEEDS, *TIMES}})
    found["weights"] = exact(load_file(directory / name))
    found["checkpoint weights"] = exact(load_file(last / name))
    found["log"] = bits(without_times(json.loads((last / "trainer_state.json").read_text())["log_history"]))
    for part in ("optimizer.pt", "scheduler.pt"):
        found[part] = exact(torch.load(last / part, weights_only=True))
    return found


def without_times(log):
    """The lines of a log without what a clock says."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def exact(value):
    """Tensors as their bytes, numbers as their exact text, in whatever they are nested."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: exact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [exact(entry) for entry in value]
    return value.hex() if isinstance(value, float) else value


def largest_difference(first, second):
    """The largest difference between two runs' losses, ε and weights."""
    worst = 0.0
    one, other = (load_file(weights_file(path)) for path in (first, second))
    for name, value in one.items():
        worst = max(worst, (value.double() - other[name].double()).abs().max().item())
    runs = [json.loads((path / "run.json").read_text()) for path in (first, second)]
    for old, new in zip(*(without_times(run["history"]) for run in runs), strict=True):
        worst = max(worst, *(abs(old[key] - new[key]) for key in old))
    return max(worst, *(abs(value - runs[1]["epsilon"][path]) for path, value in runs[0]["epsilon"].items()))


def weights_file(directory):
    """A trained model's weights, or an adapter's."""
    found = directory / "adapter_model.safetensors"
    return found if found.is_file() else directory / "model.safetensors"


def uninterrupted(children, workshop, case, text_file, runs=1):
    """The directory of a run that nobody kills, and the seconds of the last of `runs` (the first caches the data)."""
    argv, directory = command(workshop, case, "whole", text_file)
    for _ in range(runs):
        shutil.rmtree(directory, ignore_errors=True)
        begun = time.monotonic()
        status, _, _, log = children.run(argv)
        assert status == 0, log
    return directory, time.monotonic() - begun


def check_what_is_there(directory, had):
    """After a kill: every checkpoint that has the name is whole, and the last one has not been lost."""
    found = checkpoints(directory)
    assert [fault_of(path) for path in found] == [None] * len(found)
    assert found or not had
    if (directory / "run.json").exists():  # killed after it, the last write
        assert json.loads((directory / "run.json").read_text())["status"] == "done"
        assert load_file(weights_file(directory))
    if (directory / "patched").is_dir():
        assert (directory / "patched" / "patch_origin.json").is_file()
        assert load_file(directory / "patched" / "model.safetensors")
    return bool(found)


def killed_at_every_write(children, argv, directory, start=1, stride=1):
    """Kills a command at its first write, then at its second, and so on until it comes to its end."""
    kills, at, had = Counter(), start, False
    while True:
        status, phase, _, log = children.run(argv, kill_at=at)
        if status == 0:
            return kills
        assert status == -9, log
        kills[phase] += 1
        had = check_what_is_there(directory, had)
        at += stride


@pytest.mark.parametrize("case, start", [("sft-full", 4), pytest.param("dpo-lora", 8, marks=pytest.mark.slow)])
def test_killed_at_some_writes(children, workshop, text_file, case, start):
    whole, _ = uninterrupted(children, workshop, case, text_file)
    argv, directory = command(workshop, case, "killed", text_file)
    kills = killed_at_every_write(children, argv, directory, start, stride=11)
    assert kills["patching"] + kills["calibrating"] and kills["saving a checkpoint"]
    assert outcome(directory) == outcome(whole)
    leftovers = [path.name for path in directory.iterdir() if path.name.startswith(".")]
    assert not leftovers


@pytest.mark.slow
@pytest.mark.parametrize("case, stride", [(case, 1 if case == "sft-full" else 4) for case in CASES])
def test_killed_once_at_every_write(children, workshop, text_file, case, stride):
    """Killed at one write, run again: for every write of a run, or every fourth."""
    whole, _ = uninterrupted(children, workshop, case, text_file)
    argv, directory = command(workshop, case, "killed", text_file)
    kills, worst, expected = Counter(), 0.0, outcome(whole)
    for at in itertools.count(1 + len(case) % stride, stride):
        shutil.rmtree(directory, ignore_errors=True)
        status, phase, _, log = children.run(argv, kill_at=at)
        assert status in (0, -9), log
        if status == 0:
            break
        kills[phase] += 1
        check_what_is_there(directory, False)
        status, _, _, log = children.run(argv)
        assert status == 0, log
        assert outcome(directory) == expected
        worst = max(worst, largest_difference(directory, whole))
    table(f"{case}, once, at every {'write' if stride == 1 else 'fourth write'}", kills, worst)
    assert min(kills[phase] for phase in ("calibrating", "patching", "saving a checkpoint", "final save")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(children, workshop, text_file, case):
    """Killed again and again, from outside, until a run comes to its end."""
    whole, seconds = uninterrupted(children, workshop, case, text_file, runs=2)
    generator = random.Random(case)
    kills, worst, expected, attempt = Counter(), 0.0, outcome(whole), 0
    while kills.total() < KILLS.get(case, 50):
        attempt += 1
        argv, directory = command(workshop, case, f"killed-{attempt}", text_file)
        status, had = -9, False
        while status != 0:
            begun = time.monotonic()
            status, phase, _, log = children.run(argv, kill_after=generator.uniform(0.05, 0.9) * seconds)
            assert status in (0, -9), log
            if status:
                kills[phase] += 1
                had = check_what_is_there(directory, had)
            else:  # the machine may have become faster
                seconds = min(seconds, 1.5 * (time.monotonic() - begun))
        assert outcome(directory) == expected
        worst = max(worst, largest_difference(directory, whole))
        shutil.rmtree(directory)
    table(f"{case}, again and again at random, {attempt} runs", kills, worst)


def table(title, kills, worst):
    """Prints where the kills hit; `pytest -m slow -s` shows it."""
    where = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES if kills[phase])
    print(f"KILLS {title}: {kills.total()} ({where}); largest difference {worst:g}")
