"""Runs `accelerate launch` from within: a command with launch options restarts itself in several processes."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError, reading

CONFIG_KEY = "accelerate_config"
PROCESSES_ASKED = "CRRELU_PROCESSES_ASKED"  # the number requested by the user, which the launched processes check


@cache
def launch_keys() -> frozenset[str]:
    """The options of `accelerate launch`, and TRL's `accelerate_config` (a shipped name or a file)."""
    from crrelu_llm.compat.accelerate import launch_actions

    # TRL reads a recipe's `env` itself, and sets the variables.
    own = {"help", "training_script", "training_script_args", "env"}
    return frozenset({action.dest for action in launch_actions() if action.option_strings} - own | {CONFIG_KEY})


def relaunch_if_asked(command: list[str], argv: list[str], values: dict[str, Any], own: set[str]) -> int | None:
    """Restarts a command through Accelerate if launch options are given.

    Args:
        command: The command: `["sft"]`, `["compare"]`.
        argv: The command line.
        values: The recipe's keys.
        own: Options known to the recipe parser, which are never launch options.

    Returns:
        The exit status of the launch, or None if there is nothing to launch.

    Raises:
        InputError: `accelerate_config` is neither a file nor a shipped name, or Accelerate refuses the launch options.
    """
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # already launched
        return None
    given = {key: value for key, value in values.items() if key in launch_keys() - own}
    options, rest = _split(argv, own)
    given |= options
    if not given:
        return None
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = []
    for key, value in given.items():
        if key == CONFIG_KEY:
            arguments += ["--config_file", _config_file(str(value))]
        elif value is True or value == "":
            arguments.append(f"--{key}")
        elif value is not False and value is not None:
            arguments += [f"--{key}", str(value)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # hides argparse's usage text of a hundred options
            parsed = launch_command_parser().parse_args([*arguments, "-m", "crrelu_llm", *command, *rest])
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise InputError(f"accelerate launch refuses {' '.join(arguments)}: {reason}") from error
    if parsed.cpu and (parsed.num_processes or 1) > 1:
        raise InputError(
            "accelerate launch --cpu runs one process, whatever num_processes says; for several on a CPU use "
            f"--{CONFIG_KEY} ddp --num_processes {parsed.num_processes} --use_cpu true"
        )
    if parsed.num_processes is not None:
        os.environ[PROCESSES_ASKED] = str(parsed.num_processes)
    try:
        return _launched(launch_command, parsed)
    finally:
        os.environ.pop(PROCESSES_ASKED, None)


def _launched(launch_command: Callable[[Any], None], parsed: Any) -> int:
    """The exit status of a launch; its processes have already reported what was wrong."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            return 2
        reason = f"exit status {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
        print(f"process {rank} of the launch on this host failed ({reason}); the others were stopped", file=sys.stderr)
        return 1
    return 0


def _split(argv: list[str], own: set[str]) -> tuple[dict[str, str], list[str]]:
    """Splits a command line into launch options and the rest."""
    keys = launch_keys() - own
    options, rest, index = {}, [], 0
    while index < len(argv):
        name, equals, value = argv[index].removeprefix("--").partition("=")
        if argv[index].startswith("--") and name in keys:
            if not equals and index + 1 < len(argv) and not argv[index + 1].startswith("--"):
                index += 1
                value = argv[index]
            options[name] = value
        else:
            rest.append(argv[index])
        index += 1
    return options, rest


def _config_file(name: str) -> str:
    from crrelu_llm.recipes_path import recipes_dir

    if Path(name).is_file():
        return _readable(name)
    folder = recipes_dir() / "accelerate_configs"
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise InputError(f"{CONFIG_KEY} {name!r} is neither a file nor one of {known}")
    return str(shipped)


def _readable(path: str) -> str:
    """Checks that Accelerate can read the configuration at `path`, and returns the path."""
    from accelerate.commands.config.config_args import load_config_from_file

    with reading(f"{CONFIG_KEY} {path} is not a configuration of Accelerate"):
        load_config_from_file(path)
    return path
