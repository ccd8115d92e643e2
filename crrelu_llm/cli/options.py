"""Options that several commands share, and the checks of their values."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from crrelu_llm.errors import InputError
from crrelu_llm.files import remove
from crrelu_llm.patch_options import OPTIONS

OTHERS = "Every other option is the recipe's (see `crrelu sft --help`)."
TRUST = "allow the model's own code to run"
OWN_DTYPE = "(default: float32, or the model's own 16 bits where they are measured to be faster)"


def add_model(parser: argparse.ArgumentParser, *others: str) -> None:
    """Adds MODEL; `others` are further forms that it may have."""
    *forms, last = ("hub name", "local directory", ".gguf file", "builtin:nano", *others)
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(forms)}, or {last}")


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust_remote_code`, a switch."""
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)


def add_json(parser: argparse.ArgumentParser, instead_of: str = "a table", what: str = "JSON") -> None:
    """Adds `--json`, a switch."""
    parser.add_argument("--json", action="store_true", help=f"print {what} instead of {instead_of}")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`."""
    parser.add_argument("--config", required=True, help="the recipe")


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int]) -> None:
    """Adds `--seeds` of a comparison."""
    text = f"one run of every arm for each seed (default: {' '.join(map(str, default))})"
    parser.add_argument("--seeds", nargs="+", type=int, default=list(default), help=text)


def add_patch(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds options of a patch, all of them where no names are given."""
    for name in names or OPTIONS:
        default, text = OPTIONS[name]
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            text = f"{text} (default: {default})"
            parser.add_argument(f"--{name}", type=type(default), default=default, help=text)


def add_epsilon_per(parser: argparse.ArgumentParser) -> None:
    """Adds `--epsilon_per` to a command that does not patch, and so has to check its value."""
    default, text = OPTIONS["epsilon_per"]
    text = f"{text} (default: {default})"
    parser.add_argument("--epsilon_per", choices=("layer", "channel"), default=default, help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, which `device` reads."""
    text = "auto: the GPU where there is one"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


def device(name: str) -> str:
    """`cuda` or `cpu`, for a value of `--device`.

    Raises:
        InputError: There is no GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def count(text: str) -> int:
    """The type of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def writable(name: str, *files: str, option: str = "--output_dir") -> Path:
    """A directory that can be written to, and in which these files can be replaced.

    Raises:
        InputError: It cannot, or they cannot.
    """
    path = Path(name).resolve()
    existing = next(entry for entry in (path, *path.parents) if entry.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{path}: cannot write there; choose another {option}")
    for file in files:
        if (path / file).is_dir():
            raise InputError(f"{path / file} is a directory; choose another {option}")
    return path


def writable_if_given(output_dir: str | None, plot: bool) -> Path | None:
    """The same for a directory that a command can do without.

    Raises:
        InputError: It cannot be written to; or there is none, and `--plot` needs one.
    """
    if output_dir is not None:
        return writable(output_dir)
    if plot:
        raise InputError("--plot draws into a directory; give --output_dir too")
    return None


def new_directory(name: str | Path) -> Path:
    """A directory that does not exist yet, or is empty, and can be made.

    Raises:
        InputError: It holds something, or cannot be made.
    """
    path = Path(name).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if (path / "patch_origin.json").is_file():  # a patched model: its call may have been killed at the very end
            remove(path.with_name(f".{path.name}.calibration"))
        raise InputError(f"{path} already exists; choose another --output_dir")
    parent = next(entry for entry in path.parents if entry.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot write below {parent}; choose another --output_dir")
    return path
