"""Starts recipes on two processes through `accelerate launch`, and compares what comes out with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from runs import LORA, losses
from safetensors.torch import load_file

from crrelu_llm.patching.loading import head_of, load_config
from crrelu_llm.recipes_path import recipes_dir

ON_CPU = Path(__file__).with_name("on_cpu.py")
# What two processes with half the batch give is what one gives: no dropout, and documents of one length, so that the
# two halves of a batch weigh the same.
COMMON = {"max_length": 8, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
CASES = {
    "sft-full": ("sft", {}),
    "sft-lora": ("sft", LORA | {"lora_dropout": 0.0}),
    "dpo-full": ("dpo", {"max_length": 48}),
    "dpo-lora": ("dpo", LORA | {"lora_dropout": 0.0, "max_length": 48}),
    # Its loss without the divergence, which TRL estimates on each process's own batch. GRPO and RLOO have no case, as
    # each process draws other answers.
    "kto-full": ("kto", {"loss_type": "apo_zero_unpaired", "max_length": 48}),
    "reward-full": ("reward", {"max_length": 48}),
}


def command_line(folder, configuration, commands, *options):
    """The launch of command lines with a shipped Accelerate configuration."""
    listed = Path(folder) / f"{configuration}.json"
    listed.write_text(json.dumps(commands))
    where = recipes_dir() / "accelerate_configs" / f"{configuration}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(where)]
    return [*launcher, "--num_processes", "2", "--mixed_precision", "no", *options, str(ON_CPU), str(listed)]


def launch(folder, configuration, commands, *options):
    """Runs command lines on two processes of this host; returns what they print."""
    done = subprocess.run(
        command_line(folder, configuration, commands, "--main_process_port", "0", *options),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HOME": str(Path(folder) / "hf")},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def recipe(workshop, name, configuration, case, **options):
    """The command line of a case, for one process or, with a configuration, for two with half the batch."""
    kind, values = CASES[case]
    many = {} if configuration is None else {"use_cpu": configuration == "ddp", "per_device_train_batch_size": 2}
    one = {"per_device_train_batch_size": 4} if configuration is None else {}
    return [kind, *workshop.argv(kind, name, **(COMMON | values | one | many | options))]


def record(workshop, name):
    """run.json of a run."""
    return json.loads((workshop.folder / name / "run.json").read_text())


def weights(workshop, name):
    """All that a run saved: the model's weights, or the adapter's."""
    folder = workshop.folder / name
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def reloaded_logits(workshop, name):
    """Logits of a saved model or adapter, as a plain process loads it."""
    import transformers
    from peft import AutoPeftModelForCausalLM

    folder = workshop.folder / name
    if (folder / "adapter_config.json").is_file():
        loader = AutoPeftModelForCausalLM
    else:
        loader = getattr(transformers, head_of(load_config(str(folder))))
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 38)[None]).logits


def differences(workshop, name, other):
    """The largest differences between two runs: in losses, ε, weights, and the logits of the reloaded models."""
    ours, theirs = record(workshop, name), record(workshop, other)
    assert len(losses(ours)) == len(losses(theirs)) > 0
    assert ours["epsilon"].keys() == theirs["epsilon"].keys()
    mine, yours = weights(workshop, name), weights(workshop, other)
    shared = mine.keys() & yours.keys()  # a sharded run saves tied weights twice
    assert {key for key in mine.keys() ^ yours.keys() if key != "lm_head.weight"} == set()
    return {
        "loss": max(abs(a - b) for a, b in zip(losses(ours), losses(theirs), strict=True)),
        "epsilon": max((abs(ours["epsilon"][k] - theirs["epsilon"][k]) for k in theirs["epsilon"]), default=0.0),
        "weights": max((mine[k].float() - yours[k].float()).abs().max().item() for k in shared),
        "reload": (reloaded_logits(workshop, name) - reloaded_logits(workshop, other)).abs().max().item(),
    }
