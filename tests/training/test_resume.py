"""A resumed run repeats the losses of an uninterrupted one, bit by bit."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs import losses, sft_rows, trainers_and_methods
from safetensors.torch import load_file
from transformers import TrainerCallback

from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.training import run
from crrelu_llm.training.run import last_checkpoint, run_recipe
from crrelu_llm.training.trainers import build_trainer

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def weights(folder):
    """The bytes of the weights that a run saved."""
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return {key: value.numpy().tobytes() for key, value in load_file(folder / name).items()}


@trainers_and_methods
def test_resuming_from_a_path_repeats_the_tail(workshop, kind, options):
    whole = workshop.run(kind, "whole", **options, **SAVING)
    assert len(set(losses(whole))) == 6
    checkpoint = workshop.folder / "whole" / "checkpoint-3"
    again = workshop.run(kind, "again", **options, **SAVING, resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    assert again["epsilon"] == whole["epsilon"]
    assert weights(workshop.folder / "again") == weights(workshop.folder / "whole")


def test_resuming_from_the_newest_checkpoint(workshop):
    argv = workshop.argv("sft", "run", **SAVING)
    whole = run_recipe("sft", argv)
    output = workshop.folder / "run"
    expected = weights(output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "model.safetensors").unlink()
    assert last_checkpoint(output) == str(output / "checkpoint-3")
    resumed = run_recipe("sft", [*argv, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)
    assert weights(output) == expected


def test_a_checkpoint_without_an_optimiser_is_resumed_with_a_warning(workshop, caplog):
    argv = workshop.argv("sft", "run", **SAVING, save_only_model=True)
    whole = run_recipe("sft", argv)
    caplog.clear()
    resumed = run_recipe("sft", [*argv, "--resume_from_checkpoint", str(workshop.folder / "run" / "checkpoint-3")])
    assert "the optimiser and the learning-rate schedule start again" in caplog.text
    # What was summed up before is not known: the mean is that of the steps since.
    since = losses(resumed)[3:]
    assert resumed["metrics"]["train_loss"] == pytest.approx(sum(since) / 3, rel=1e-5)
    assert losses(resumed)[:3] == losses(whole)[:3]


def test_a_run_does_not_resume_unasked(workshop):
    argv = workshop.argv("sft", "run", **SAVING)
    first = run_recipe("sft", argv)
    second = run_recipe("sft", [*argv, "--resume_from_checkpoint", "false"])
    assert losses(second) == losses(first)
    assert second["train_seconds"] != first["train_seconds"]


def test_nothing_to_resume_from(workshop):
    with pytest.raises(InputError, match=r"resume_from_checkpoint: .*run has no checkpoint to resume from"):
        workshop.run("sft", "run", resume_from_checkpoint="true")
    with pytest.raises(InputError, match=r"\./absent is not a whole checkpoint"):
        workshop.run("sft", "run", resume_from_checkpoint="./absent")
    assert not (workshop.folder / "run").exists()


def test_another_patch_in_the_same_folder_is_refused(workshop):
    workshop.run("sft", "run")
    with pytest.raises(InputError, match="holds another patched checkpoint"):
        workshop.run("sft", "run", epsilon_init=0.5)


def test_control_c_says_how_to_go_on(workshop, capsys, monkeypatch):
    class Interrupted(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                signal.raise_signal(signal.SIGINT)

    def build(*args):
        trainer = build_trainer(*args)
        trainer.add_callback(Interrupted())
        return trainer

    monkeypatch.setattr(run, "build_trainer", build)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["sft", *workshop.argv("sft", "run", **SAVING)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    check_advice(workshop.folder / "run", capsys.readouterr().err)
    assert last_checkpoint(workshop.folder / "run").endswith("checkpoint-3")


def check_advice(directory, error):
    """Asserts that an interrupted command ends with the line that says how to go on."""
    newest = last_checkpoint(directory)
    last = f"crrelu sft: interrupted; {newest} is safe; add --resume_from_checkpoint {newest} to go on"
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1] == last


@pytest.mark.slow  # half a minute or more of a busy core
def test_control_c_of_a_real_process(workshop):
    data = workshop.data("sft", train=sft_rows(64))
    argv = workshop.argv("sft", "run", dataset_name=data, max_steps=100_000, save_strategy="steps", save_steps=20)
    process = subprocess.Popen(
        [sys.executable, "-m", "crrelu_llm", "sft", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    checkpoint = workshop.folder / "run" / "checkpoint-20"
    try:
        deadline = time.monotonic() + 120
        while not (checkpoint / "trainer_state.json").is_file():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for patience in (60, 60):  # Python drops an interrupt that arrives in a destructor; people press again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, stderr = process.communicate(timeout=patience)
                break
    finally:
        process.kill()
    assert process.returncode == 130
    check_advice(workshop.folder / "run", stderr)
