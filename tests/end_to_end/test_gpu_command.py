"""eval/gpu: parts that fail or hang, what is carried and damaged on the way, wrong input; slow: the whole dry run."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

GPU = Path(__file__).parents[2] / "eval" / "gpu"
SCRIPTS = ["run.sh", "pack.sh", "parts.sh"]


def bash(*command, **environment):
    """A script's exit status and output; every path that it could take from this process's environment is set."""
    variables = {key: value for key, value in os.environ.items() if key not in ("MODEL", "SFT_DATA", "DPO_DATA")}
    variables |= {"PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", *map(str, command)], env=variables, capture_output=True, text=True, timeout=2000)


def carry(*arguments):
    return subprocess.run([sys.executable, GPU / "carry.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_bash(script):
    done = bash("-n", GPU / script)
    assert (done.returncode, done.stderr) == (0, "")


_PARTS = r"""
PYTHON=$1 WORK=$2 OUT=$3 BUDGET=60
. "$4/parts.sh"
GRACE=1
part first 10 bash -c 'echo {\"value\": 1} >"$1"; echo done' _ "$WORK/parts/first/result.json"
part second 10 bash -c 'echo to stderr >&2; exit 7'
part third 3 bash -c 'trap "" INT; echo hangs; while true; do sleep 1; done'
part fourth 10 no-such-command
part fifth 10 echo 'the last one'
BUDGET=$SECONDS
part sixth 10 echo never
skip seventh 'no reason'
gather
"""


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (tmp_path / "parts").write_text(_PARTS)
    done = bash(tmp_path / "parts", sys.executable, work, out, GPU)
    assert done.returncode == 0, done.stderr
    parts = {part["part"]: part for part in json.loads((out / "results.json").read_text())["parts"]}
    assert {name: part["status"] for name, part in parts.items()} == {
        "first": "ok", "second": "failed", "third": "time limit", "fourth": "failed", "fifth": "ok",
        "sixth": "skipped", "seventh": "skipped",
    }  # fmt: skip
    assert parts["first"]["results"] == {"result": {"value": 1}}
    assert (parts["second"]["why"], parts["second"]["said"]) == ("exit status 7", "to stderr")
    assert 3 <= parts["third"]["seconds"] <= 5 and parts["third"]["said"] == "hangs"
    assert (parts["sixth"]["why"], parts["seventh"]["why"]) == ("no time was left", "no reason")
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[0].split()[:4] == ["part", "status", "seconds", "limit"]
    assert [line.split()[0] for line in lines[1:8]] == list(parts)
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert {"first/log", "first/result.json", "third/log"} <= set(archive.getnames())
    assert {path.name for path in out.iterdir()} == {"summary.txt", "results.json", "logs.tar.gz"}


@pytest.fixture
def packed(tmp_path):
    """A checkpoint of 300 kB in parts of at most 0.1 MB, and its folder."""
    model, folder = tmp_path / "model", tmp_path / "carry"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(torch.randint(256, (300_000,), dtype=torch.uint8).numpy().tobytes())
    for arguments in (("split", model, folder, "0.1"), ("sums", folder)):
        assert carry(*arguments).returncode == 0
    return model, folder


def test_weights_in_parts_are_the_same_again(packed, tmp_path):
    model, folder = packed
    parts = sorted(folder.glob("weights-*"))
    assert [path.name for path in parts] == [f"weights-{index}-of-4" for index in range(1, 5)]
    assert max(path.stat().st_size for path in parts) <= 100_000
    assert carry("join", folder, tmp_path / "again").returncode == 0
    for path in model.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("how", ["missing", "damaged", "none"])
def test_weights_that_are_not_whole_are_one_line_before_anything_runs(packed, tmp_path, how):
    _, folder = packed
    for path in folder.glob("weights-*") if how == "none" else [folder / "weights-2-of-4"]:
        if how == "damaged":
            path.write_bytes(b"x" + path.read_bytes()[1:])
        else:
            path.unlink()
    said = {"missing": "missing: weights-2-of-4", "damaged": "weights-2-of-4: damaged", "none": "no weights there"}
    done = carry("join", folder, tmp_path / "again")
    assert done.returncode == 2 and said[how] in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "again").exists()
    if how != "none":  # without any, a small model of the package is taken
        done = bash(GPU / "run.sh", tmp_path / "out", CARRY=str(folder))
        assert done.returncode == 2 and said[how] in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "environment", "said"),
    [
        (["run.sh"], {}, "usage: eval/gpu/run.sh"),
        (["run.sh", "full"], {}, "full is not empty; choose another folder"),
        (["run.sh", "full/file"], {}, "full/file is a file; choose a folder"),
        (["pack.sh", "new"], {"SFT_DATA": "nowhere"}, "SFT_DATA: no such folder: nowhere"),
        (["pack.sh", "new"], {"CALIBRATION_DATA": "nowhere"}, "CALIBRATION_DATA: no such file: nowhere"),
        (["pack.sh", "new"], {"PYTHON": "/no/python"}, "/no/python has no pip"),
    ],
)
def test_wrong_input(command, environment, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = bash(GPU / command[0], *command[1:], **environment)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "new").exists()


def _patched(folder, epsilon=0.3, perplexity=20.0):
    """As little of a patched checkpoint as a comparison of calibrations reads."""
    folder.mkdir()
    five = {"epsilon": epsilon, "scale": 1.2, "shift": 0.5, "gain": 0.9, "offset": -0.1}
    tensors = {f"layers.0.act.{name}": torch.full((40,), value) for name, value in five.items()}
    save_file(tensors, folder / "model.safetensors")
    report = {"perplexity": {"before": 19.0, "after": perplexity}, "calibration": {"seconds": 1, "forward_seconds": 1}}
    (folder / "patch_report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("other", "status"),
    [({"epsilon": 0.3001, "perplexity": 20.05}, 0), ({"epsilon": 0.33}, 1), ({"perplexity": 20.2}, 1)],
)
def test_calibrations_agree_within_what_is_allowed(tmp_path, monkeypatch, other, status):
    first, second = _patched(tmp_path / "first"), _patched(tmp_path / "second", **other)
    monkeypatch.syspath_prepend(str(GPU))
    command = importlib.import_module("calibration")
    assert command.main([str(first), str(second), str(tmp_path / "found.json")]) == status
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["agree"] == (status == 0) and found["channels"] == 40


@pytest.mark.slow
def test_the_dry_run_goes_through_all_parts(tmp_path):
    """Every command that a GPU machine runs, with tiny sizes on the CPU."""
    out = tmp_path / "out"
    done = bash(GPU / "run.sh", "--dry-run", out, CARRY=str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr
    parts = {part["part"]: part for part in json.loads((out / "results.json").read_text())["parts"]}
    assert len(parts) == 14
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "ok"), done.stderr
    assert parts["tests"]["results"]["tests"]["skipped"] > 40
    assert parts["calibration"]["results"]["calibration"]["agree"]
    for name in ("bench-op-bfloat16", "bench-op-float32", "bench-mlp", "bench-train"):
        assert parts[name]["results"]["bench"]["cases"]
    for kind in ("sft", "dpo"):
        report = json.loads((out / f"{kind}.report.json").read_text())
        assert {arm["arm"] for arm in report["arms"]} == {"native", "gelu", "relu", "crrelu"}
        assert all(run["status"] == "done" for arm in report["arms"] for run in arm["runs"])
    names = {"summary.txt", "results.json", "logs.tar.gz"}
    names |= {f"{kind}.report.{ending}" for kind in ("sft", "dpo") for ending in ("json", "md")}
    assert {path.name for path in out.iterdir()} == names
