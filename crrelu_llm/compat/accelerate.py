"""Accelerate: sharding under FSDP2, and the options of its launcher."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from crrelu_llm.compat import Private

RELIES_ON = (
    Private(
        "accelerate.accelerator:fsdp2_prepare_model",
        "FSDP2 with calibrated activations, whose buffers it does not shard",
        takes=("accelerator", "model"),
        called_by="accelerate.accelerator:Accelerator._prepare_fsdp2",
    ),
    Private("accelerate.commands.launch:launch_command", "launch options in a recipe"),
    Private("accelerate.commands.launch:launch_command_parser", "launch options in a recipe"),
    Private("accelerate.commands.config.config_args:load_config_from_file", "the check of accelerate_config"),
)


@contextlib.contextmanager
def sharding(shard: Callable[[Any, Any], Any]) -> Iterator[None]:
    """A context in which Accelerate shards models under FSDP2 with `shard(accelerator, model)`."""
    from accelerate import accelerator

    original = accelerator.fsdp2_prepare_model
    accelerator.fsdp2_prepare_model = shard
    try:
        yield
    finally:
        accelerator.fsdp2_prepare_model = original


def launch_actions() -> list[argparse.Action]:
    """Every option of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()._actions
