"""Parses the arms and the grid of a comparison as the user writes them, and names their directories."""

import itertools
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError, reading

NATIVE = "native"


@dataclass(frozen=True)
class Arm:
    """One activation with its patch options: `gelu`, `crrelu:calibration=fit:epsilon_per=channel`, `native`.

    Layers may have different activations: `0-5=relu,6-=crrelu:calibration=none`.
    """

    name: str
    activation: str | None
    options: tuple[tuple[str, str], ...]

    @property
    def argv(self) -> list[str]:
        """The arm as recipe options."""
        argv = [] if self.activation is None else ["--activation", self.activation]
        return argv + [part for key, value in self.options for part in (f"--{key}", value)]


def parse_arm(text: str) -> Arm:
    """Parses one arm.

    Raises:
        InputError: The activation or an option is unknown, or an option has no value.
    """
    from crrelu_llm.patching import mixture
    from crrelu_llm.training.activation_section import ActivationArguments

    activation, *parts = text.split(":")
    if activation != NATIVE:
        with reading(f"arm {text!r}", "or native", ours=True):
            mixture.check(activation)
    known = [field.name for field in fields(ActivationArguments) if field.name != "activation"]
    options: list[tuple[str, str]] = []
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals and options:  # a colon within a value: calibration_data=builtin:docstrings
            options[-1] = (options[-1][0], f"{options[-1][1]}:{part}")
            continue
        if key not in known or not equals or not value:
            raise InputError(f"arm {text!r}: {part!r} is not key=value with a key of {', '.join(known)}")
        options.append((key, value))
    return Arm(text, None if activation == NATIVE else activation, tuple(options))


def parse_arms(texts: list[str]) -> list[Arm]:
    """Parses the arms of a comparison, which must differ."""
    if len(set(texts)) != len(texts):
        raise InputError(f"--arms: give each arm once, not {' '.join(texts)}")
    return [parse_arm(text) for text in texts]


def check_baseline(arms: list[Arm], baseline: str | None) -> None:
    """Raises InputError if the baseline is not one of the arms."""
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise InputError(f"--baseline {baseline} is not one of the arms: {' '.join(names)}")


def default_baseline(arms: list[Arm]) -> str:
    """The baseline if the user chose none: gelu, else native, else the first arm."""
    names = [arm.name for arm in arms]
    return next((name for name in ("gelu", NATIVE) if name in names), names[0])


def parse_grid(texts: list[str]) -> list[dict[str, str]]:
    """Parses `["beta=0.1,1", "max_steps=5,10"]` into all combinations, as recipe options.

    Without a grid there is one empty point.
    """
    axes = []
    for text in texts:
        key, equals, values = text.partition("=")
        points = [value.strip() for value in values.split(",") if value.strip()]
        if not key or not equals or not points or len(set(points)) != len(points):
            raise InputError(f"--grid: write key=value,value,… with each value once, not {text!r}")
        axes.append([(key, value) for value in points])
    keys = [axis[0][0] for axis in axes]
    if len(set(keys)) != len(keys):
        raise InputError(f"--grid: give each key once, not {' '.join(keys)}")
    return [dict(point) for point in itertools.product(*axes)]


def grid_argv(point: dict[str, str]) -> list[str]:
    """A grid point as recipe options."""
    return [part for key, value in point.items() for part in (f"--{key}", value)]


def grid_name(point: dict[str, str]) -> str:
    """A grid point as a directory name: `beta=0.1`, or `beta=0.1,max_steps=5`."""
    return directory_name(",".join(f"{key}={value}" for key, value in point.items()))


def directory_name(text: str) -> str:
    """An arm or a grid point as a directory name that is valid on every file system: `:` becomes `%3A`, `/` `%2F`."""
    return re.sub(r'[<>:"/\\|?*%\x00-\x1f]', lambda found: f"%{ord(found[0]):02X}", text)


def arm_dir(output_dir: Path, arm: str, point: dict[str, str]) -> Path:
    """The directory of an arm at a grid point: starting checkpoint, metrics before training, and runs."""
    earlier = output_dir / arm.replace("/", "%2F")  # the name in version 0.1
    return (earlier if earlier.is_dir() else output_dir / directory_name(arm)) / grid_name(point)


def check_grid(points: list[dict[str, str]], arms: list[Arm]) -> None:
    """Refuses grid keys that the comparison sets itself or reads once for all runs, and keys that an arm sets.

    Raises:
        InputError: The grid has such a key.
    """
    taken = {"seed", "data_seed", "output_dir", "activation", "config", "datasets", "streaming", "test_split_size"}
    for key in points[0]:
        if key in taken or key.startswith("dataset_"):
            raise InputError(f"--grid {key}=…: a comparison cannot vary this key; run one comparison for each value")
        for arm in arms:
            if key in dict(arm.options):
                raise InputError(f"--grid {key}=…: the arm {arm.name} sets this key too; leave one of them out")


def number(value: str) -> Any:
    """Converts a grid value to a number if possible, for the report."""
    try:
        return float(value) if not value.lstrip("+-").isdigit() else int(value)
    except ValueError:
        return value
