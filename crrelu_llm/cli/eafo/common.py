"""What the commands that run a model have in common: their options, and the check of where they write."""

import argparse
import os
from pathlib import Path

from crrelu_llm.errors import InputError

MIN_SAMPLES = 100  # that of eafo.density, which imports numpy


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the text that it runs over."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name, local directory, .gguf file, or builtin:nano")
    add("--data", default="builtin:docstrings", help="text or images: hub name, local file or directory, or built in")
    add("--tokens", type=int, default=8192, help="tokens of it to run over (default: 8192)")
    add("--images", type=int, default=256, help="images of it, of an image model (default: 256)")
    add("--samples", type=int, default=20_000, help="pre-activations of a site to keep (default: 20000)")
    add("--seed", type=int, default=0, help="of the sampling and of the untrained model (default: 0)")
    add("--trust_remote_code", action="store_true", help="allow the model's own code to run")
    add("--plot", action="store_true", help="also draw a picture in the output directory")
    add("--json", action="store_true", help="print JSON instead of a table")


def check(args: argparse.Namespace) -> Path | None:
    """The output directory; refuses before the work, not after it.

    Raises:
        InputError: A directory that cannot be written to, a picture without one, or too small a number.
    """
    if args.samples < MIN_SAMPLES:
        raise InputError(f"--samples must be {MIN_SAMPLES} or more, not {args.samples}")
    for name in ("tokens", "images"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.seed < 0:
        raise InputError(f"--seed must be 0 or more, not {args.seed}")
    if args.output_dir is None:
        if args.plot:
            raise InputError("--plot draws into a directory; give --output_dir too")
        return None
    return writable(args.output_dir)


def writable(name: str, *files: str, option: str = "--output_dir") -> Path:
    """Checks that a directory can be written to, and files in it replaced.

    Raises:
        InputError: It cannot.
    """
    path = Path(name).resolve()
    existing = next(entry for entry in (path, *path.parents) if entry.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{path}: cannot write there; choose another {option}")
    for file in files:
        if (path / file).is_dir():
            raise InputError(f"{path / file} is a directory; choose another {option}")
    return path
