"""Runs `crrelu` commands as one of several processes on a CPU, as Accelerate would run them on one of several GPUs.

Accelerate takes every launch without an accelerator for DDP on CPUs: an FSDP2 configuration silently trains unsharded.
Here its processes are told that they have a GPU each, while every tensor stays on the CPU and gloo carries the
messages, so that the real FSDP2 and DeepSpeed run. Under any other configuration Accelerate is left as it is.

    accelerate launch --config_file X.yaml on_cpu.py commands.json     # a list of command lines, one after the other
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def pretend():
    """Makes Accelerate and DeepSpeed take this process for one with a GPU of its own."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    import_module("transformers.training_args").is_torch_bf16_gpu_available = lambda: True
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # It would compile a faster way between processes.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def run(commands):
    """Runs commands until one fails; returns its exit status."""
    from crrelu_llm.cli.main import main

    PartialState.destroy_process_group = lambda self, group=None: None  # each command would at its end
    for command in commands:
        status = main(command)
        if status:
            return status
    return 0


if __name__ == "__main__":
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        pretend()
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
