"""`crrelu sft --accelerate_config ddp --num_processes 2` starts itself, as a user types it."""

import os
import subprocess
import sys

import pytest
from launches import differences, recipe, record

from crrelu_llm.cli.main import main


def start(workshop, *command):
    """Runs a command in a shell of its own; returns its exit status and what it said on stderr."""
    environment = os.environ | {"HF_HOME": str(workshop.folder / "hf")}
    command = [sys.executable, "-m", "crrelu_llm", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


@pytest.mark.slow  # one process: training/test_launch_options.py; two of `accelerate launch`: test_launches.py
def test_two_processes_of_one_command(workshop):
    options = ["--accelerate_config", "ddp", "--num_processes", "2", "--mixed_precision", "no"]
    status, error = start(workshop, *recipe(workshop, "two", "ddp", "sft-full"), *options, "--main_process_port", "0")
    assert status == 0, error
    assert main(recipe(workshop, "one", None, "sft-full")) == 0
    assert record(workshop, "two")["environment"]["processes"] == 2
    assert max(differences(workshop, "two", "one").values()) < 1e-4
    assert error.count("trained 4 steps") == 1  # said once


@pytest.mark.slow  # what each process says and how a launch ends is in training/test_processes.py too, without one
def test_what_one_process_finds_wrong_is_one_line(workshop):
    argv = [*recipe(workshop, "two", "ddp", "sft-full"), "--dataset_name", "./absent.jsonl"]
    options = ["--accelerate_config", "ddp", "--num_processes", "2", "--mixed_precision", "no"]
    status, error = start(workshop, *argv, *options, "--main_process_port", "0")
    assert status == 2, error
    assert error.count("absent.jsonl") == 1 and "Traceback" not in error, error


@pytest.mark.slow  # half a minute or more of a busy core
def test_sharding_that_the_machine_does_not_do_is_one_line(workshop):
    argv = recipe(workshop, "two", "ddp", "sft-full")
    options = ["--accelerate_config", "fsdp2", "--num_processes", "2", "--mixed_precision", "no"]
    status, error = start(workshop, *argv, *options, "--main_process_port", "0")
    assert status == 2, error
    assert error.count("the launch asks for FSDP, which Accelerate does not run on this device") == 1
    assert "Traceback" not in error
