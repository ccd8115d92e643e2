"""Through `accelerate launch`: the same losses as without it, in one process and in two."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import LORA, losses
from safetensors.torch import load_file

from crrelu_llm.training.resume import checkpoints, fault_of


def launch(workshop, name, arguments, kind="sft", **options):
    """What run.json says after `accelerate launch <arguments> -m crrelu_llm sft --config ...`."""
    argv = workshop.argv(kind, name, **options)
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "-m", "crrelu_llm", kind, *argv]
    empty = workshop.folder / "accelerate"  # no default configuration of the user's
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HOME": str(empty)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads((workshop.folder / name / "run.json").read_text())


@pytest.mark.slow  # half a minute or more of a busy core
def test_one_process(workshop):
    launched = launch(workshop, "launched", ["--num_processes", "1", "--cpu"])
    plain = workshop.run("sft", "plain")
    assert losses(launched) == losses(plain)
    assert launched["epsilon"] == plain["epsilon"]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(workshop, tiny_llama_checkpoint):
    # A model without dropout, and documents of one length, so that the two batches weigh the same
    options = {"model_name_or_path": str(tiny_llama_checkpoint), "max_length": 8}
    arguments = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launched = launch(workshop, "launched", arguments, **options)
    plain = workshop.run("sft", "plain", **options, per_device_train_batch_size=4)
    assert (launched["environment"]["processes"], plain["environment"]["processes"]) == (2, 1)
    np.testing.assert_allclose(losses(launched), losses(plain), rtol=1e-4)
    assert launched["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_resume(workshop, tiny_llama_checkpoint):
    options = {"model_name_or_path": str(tiny_llama_checkpoint), "max_steps": 6, "logging_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "resume_from_checkpoint": "auto"}
    arguments = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    whole = launch(workshop, "run", arguments, **options)
    output = workshop.folder / "run"
    weights = load_file(output / "model.safetensors")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-6", "checkpoint-4"]
    names = {path.name for path in (output / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "log_state_0.json", "log_state_1.json"} <= names
    assert [fault_of(path) for path in checkpoints(output)] == [None, None] and not list(output.glob(".*"))
    (output / "checkpoint-6").rename(output / ".checkpoint-6.removed.tmp")  # as a kill leaves it
    again = launch(workshop, "run", arguments, **options)
    assert again["resumed"] and losses(again) == losses(whole) and again["epsilon"] == whole["epsilon"]
    assert again["metrics"]["train_loss"] == whole["metrics"]["train_loss"]
    assert all(torch.equal(value, weights[key]) for key, value in load_file(output / "model.safetensors").items())
    assert not list(output.glob(".*"))


@pytest.mark.slow
def test_two_processes_blend_and_distil_as_one(workshop, tiny_llama_checkpoint):
    options = {"model_name_or_path": str(tiny_llama_checkpoint), "max_length": 8, "max_steps": 4, "epsilon_init": 0.2}
    options |= {"blend_steps": 2, "distill_weight": 2.0}
    arguments = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launched = launch(workshop, "launched", arguments, **options)
    plain = workshop.run("sft", "plain", **options, per_device_train_batch_size=4)
    np.testing.assert_allclose(losses(launched), losses(plain), rtol=1e-4)
    ours, theirs = ([entry["distill_kl"] for entry in run["history"]] for run in (plain, launched))
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-6)
    assert launched["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LORA | {"lora_dropout": 0.0}], ids=["full", "lora"])
def test_two_processes_share_the_reference_of_a_blend(workshop, tiny_llama_checkpoint, options):
    options = options | {"model_name_or_path": str(tiny_llama_checkpoint), "epsilon_init": 0.2, "max_grad_norm": 0}
    options |= {"max_steps": 4, "blend_steps": 3}
    arguments = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launched = launch(workshop, "launched", arguments, "dpo", **options)
    plain = workshop.run("dpo", "plain", **options, per_device_train_batch_size=4)
    np.testing.assert_allclose(losses(launched), losses(plain), rtol=1e-4)
    assert launched["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-5)
