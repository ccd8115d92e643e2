"""`crrelu quickstart` on the embedded model, without a network: in this process, with a part of the data and of
the steps, and as a newcomer runs it; one seed to save time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from crrelu_llm import recipes_path
from crrelu_llm.cli.main import main
from crrelu_llm.comparison import matrix
from crrelu_llm.data.sources import load_dataset
from crrelu_llm.recipes_path import recipes_dir

OPTIONS = ["quickstart", "--seeds", "0", "--output_dir"]


def check_report(directory, printed):
    """Asserts that the report says what the project is about."""
    report = json.loads((directory / "report.json").read_text())
    assert "only one seed" in report["verdict"]
    *table, _, headline, path = printed.splitlines()
    assert [line.split()[0] for line in table[1:]] == [arm["arm"] for arm in report["arms"]]
    assert headline == "Undecided: one seed cannot tell crrelu from native." and path.endswith("report.html")
    runs = {arm["arm"]: arm["runs"][0]["metrics"]["perplexity"] for arm in report["arms"]}
    assert set(runs) == {"native", "relu", "crrelu:calibration=none", "crrelu"}
    before = {arm["arm"]: arm["before"]["perplexity"] for arm in report["arms"]}
    # What the project is about, measured: the plain swap destroys the model, the refit keeps it.
    assert before["crrelu:calibration=none"] > 2 * before["native"]
    assert before["crrelu"] < 1.02 * before["native"]
    assert before["relu"] < 1.5 * before["native"]  # treated alike: what is left is what ε would mend
    assert all(after < before[arm] for arm, after in runs.items())
    page = (directory / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_quickstart_is_interrupted_goes_on_and_ends_with_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CRRELU_BACKEND", "eager")  # to compile takes longer than all four trainings
    recipe = yaml.safe_load((recipes_dir() / "nano" / "sft.yaml").read_text())
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 200), ("test", 30)):
        load_dataset("builtin:docstrings")[split].select(range(rows)).to_json(data / f"{split}.jsonl")
    (tmp_path / "nano").mkdir()
    less = {"dataset_name": str(data), "dataset_train_split": "train", "dataset_test_split": "test", "max_steps": 3}
    less |= {"logging_steps": 1, "calibration_tokens": 2048}
    (tmp_path / "nano" / "sft.yaml").write_text(yaml.safe_dump(recipe | less))
    monkeypatch.setattr(recipes_path, "recipes_dir", lambda: tmp_path)
    directory, build = tmp_path / "out", matrix.build_trainer

    def interrupted(recipe, *args):
        if recipe.activation.activation == "relu":  # the second arm
            signal.raise_signal(signal.SIGINT)
        return build(recipe, *args)

    with monkeypatch.context() as patched:
        patched.setattr(matrix, "build_trainer", interrupted)
        assert main([*OPTIONS, str(directory)]) == 130
    error = capsys.readouterr().err
    assert "[1/4] native, seed 0: loss " in error and "'loss'" not in error
    assert "Traceback" not in error and "1 of 4 runs are finished and kept; run the same command again" in error
    first = directory / "native" / "seed-0" / "run.json"
    stamp = first.stat().st_mtime_ns
    assert main([*OPTIONS, str(directory)]) == 0
    assert first.stat().st_mtime_ns == stamp
    check_report(directory, capsys.readouterr().out)


@pytest.mark.slow  # two starts and compiled loops more
def test_a_real_quickstart_is_interrupted_goes_on_and_ends_with_a_report(tmp_path):
    directory = tmp_path / "out"
    command = [sys.executable, "-m", "crrelu_llm", *OPTIONS, str(directory)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "2"}
    first = directory / "native" / "seed-0" / "run.json"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 300
    while not first.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert first.is_file(), "the first run never finished"
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert "run the same command again to go on" in error.splitlines()[-1]
    stamp = first.stat().st_mtime_ns

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert first.stat().st_mtime_ns == stamp
    check_report(directory, done.stdout)
