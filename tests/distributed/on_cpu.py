"""Runs `crrelu` commands as one of several processes on a CPU, as Accelerate would run them on one of several GPUs.

Accelerate takes every launch without an accelerator for DDP on CPUs: an FSDP2 configuration silently trains unsharded.
Here its processes are told that they have a GPU each, while every tensor stays on the CPU and gloo carries the messages,
so that the real FSDP2 and DeepSpeed run:

    accelerate launch --config_file X.yaml on_cpu.py sft --config R.yaml
    accelerate launch --config_file X.yaml on_cpu.py commands.json     # a list of command lines, one after the other
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}

import transformers.training_args  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402


def _prepare_backend(self, *_):
    return ("gloo", DistributedType.MULTI_GPU) if "LOCAL_RANK" in os.environ else (None, DistributedType.NO)


PartialState._prepare_backend = _prepare_backend
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # it would compile a faster way between processes


def run(commands):
    """Runs commands until one fails; returns its exit status."""
    from crrelu_llm.cli.main import main

    PartialState.destroy_process_group = lambda self, group=None: None  # each would at its end
    for command in commands:
        status = main(command)
        if status:
            return status
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(run(json.loads(Path(arguments[0]).read_text()) if arguments[0].endswith(".json") else [arguments]))
