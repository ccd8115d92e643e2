"""`accelerate launch` from within: a recipe or command line with launch options starts itself on several processes."""

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError

CONFIG_KEY = "accelerate_config"


@cache
def launch_keys() -> frozenset[str]:
    """The options of `accelerate launch`, and TRL's `accelerate_config` (a shipped name or a file)."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    own = {"help", "training_script", "training_script_args"}
    return frozenset({action.dest for action in actions if action.option_strings} - own | {CONFIG_KEY})


def relaunch_if_asked(command: list[str], argv: list[str], values: dict[str, Any], own: set[str]) -> int | None:
    """Starts a command again through Accelerate where launch options are given.

    Args:
        command: The command: `["sft"]`, `["compare"]`.
        argv: The command line.
        values: The recipe's keys.
        own: Options that the recipe parser knows; they are never launch options.

    Returns:
        The exit status of what was launched, or None where there is nothing to launch.

    Raises:
        InputError: An `accelerate_config` that is neither a file nor a shipped name, or launch options that
            Accelerate refuses.
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
    try:
        parsed = launch_command_parser().parse_args([*arguments, "-m", "crrelu_llm", *command, *rest])
    except SystemExit as error:
        raise InputError(f"accelerate launch refuses these options: {' '.join(arguments)}") from error
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:  # it has said what was wrong
        return error.returncode
    return 0


def _split(argv: list[str], own: set[str]) -> tuple[dict[str, str], list[str]]:
    """Launch options of a command line, and the rest."""
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
        return name
    folder = recipes_dir() / "accelerate_configs"
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise InputError(f"{CONFIG_KEY} {name!r} is neither a file nor one of {known}")
    return str(shipped)
