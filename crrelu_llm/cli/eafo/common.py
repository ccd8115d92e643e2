"""Options of the commands that run a model over data, and their checks."""

import argparse
from pathlib import Path

from crrelu_llm.cli import options
from crrelu_llm.errors import InputError

MIN_SAMPLES = 100  # as in eafo.density, which imports numpy


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the data to run it over."""
    add = parser.add_argument
    options.add_model(parser)
    add(
        "--data",
        default="builtin:docstrings",
        help="text or images: hub name, local file or directory, builtin:NAME",
    )
    add("--tokens", type=int, default=8192, help="number of tokens to run over (default: 8192)")
    add("--images", type=int, default=256, help="number of images, for an image model (default: 256)")
    add("--samples", type=int, default=20_000, help="pre-activations of a site to keep (default: 20000)")
    add("--seed", type=int, default=0, help="seed of the sampling and of the untrained model (default: 0)")
    options.add_trust_remote_code(parser)
    add("--plot", action="store_true", help="also draw a picture in the output directory")
    options.add_json(parser)


def check(args: argparse.Namespace) -> Path | None:
    """The output directory, checked before the work starts.

    Raises:
        InputError: The directory cannot be written to, `--plot` has none, or a number is too small.
    """
    if args.samples < MIN_SAMPLES:
        raise InputError(f"--samples must be {MIN_SAMPLES} or more, not {args.samples}")
    for name in ("tokens", "images"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.seed < 0:
        raise InputError(f"--seed must be 0 or more, not {args.seed}")
    return options.writable_if_given(args.output_dir, args.plot)
