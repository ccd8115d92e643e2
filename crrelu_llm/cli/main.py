"""`crrelu COMMAND`: finds the command's file, runs it, and turns errors into one line and an exit status."""

import importlib
import logging
import os
import sys
import time
import traceback
import warnings

from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.training.kinds import KINDS

# command -> (module in crrelu_llm.cli, one-line help). Modules are imported only when their command runs, so that
# `crrelu --help` stays fast.
COMMANDS = {
    "quickstart": ("quickstart", "CRReLU against GELU on the embedded model: offline, on a laptop CPU"),
    "inspect": ("inspect", "which activations of a model would be swapped, and which are left alone and why"),
    "patch": ("patch", "turn a checkpoint into a patched checkpoint"),
    **{kind: ("training", about) for kind, about in KINDS.items()},
    "compare": ("compare", "several activations and seeds of one recipe, with a report"),
    "eval": ("eval", "any checkpoints side by side on benchmarks, preference pairs or text, with a report"),
    "report": ("report", "rebuild the report of a comparison or an evaluation from its files"),
    "export": ("export", "a patched model for ONNX Runtime, OpenVINO, ExecuTorch or plain transformers, with a check"),
    "card": ("card", "a Hugging Face model card: ε per layer, calibration, results"),
    "bench": ("bench", "speed and memory of CRReLU against GELU: the op, an MLP, a training step"),
    "eafo": ("eafo", "the entropy method: derive, measure and learn activations"),
    "plan": ("plan", "memory per GPU of a training run, for each Accelerate configuration, from the config alone"),
    "env": ("env", "versions, device, and which CRReLU backend is used here and why"),
    "recipes": ("recipes", "list, show or copy the shipped recipes"),
}


# `accelerate launch` runs these on every process; the other commands run on the first process alone.
_PATIENCE = 15.0  # seconds
DISTRIBUTED = (*KINDS, "compare")
_DEBUG = "CRRELU_DEBUG"
_KEPT = "finished runs and saved checkpoints are complete and kept"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed while running, 2 wrong input, 130 interrupted."""
    argv = _without_debug(_underscores(sys.argv[1:] if argv is None else argv))
    parser = Parser(
        prog="crrelu",
        description="Swap the MLP activation of a Hugging Face causal LM for CRReLU, fine-tune, and compare.",
        epilog="example: crrelu quickstart",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="for any command: also show the traceback of wrong input")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    if argv and argv[0] in COMMANDS:
        module = importlib.import_module(f"crrelu_llm.cli.{COMMANDS[argv[0]][0]}")
        return _run(module, argv[0], argv[1:])
    try:
        args = parser.parse_args(argv)
    except InputError as error:
        print(f"crrelu: {error}", file=sys.stderr)
        return 2
    if args.version:
        from crrelu_llm import __version__

        print(__version__)
    else:
        parser.print_help()
    return 0


def _run(module, name: str, argv: list[str]) -> int:
    _silence_libraries()
    if name not in DISTRIBUTED and os.environ.get("RANK", "0") != "0":
        return 0
    try:
        return (module.run(argv, name) if name in KINDS else module.run(argv)) or 0
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_PATIENCE)  # the first process prints the message, and the launcher then stops this one
        if os.environ.get(_DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"crrelu {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "nothing half-written was left behind; run the same command again"
        print(f"\ncrrelu {name}: interrupted; {hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`crrelu recipes show X | head`) has stopped reading: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DiskError as error:
        print(f"crrelu {name}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from crrelu_llm.files import disk_trouble

        reason = disk_trouble(error)
        if reason is not None:  # a cache of a library, a log: not a fault of the code
            print(f"crrelu {name}: failed while writing: {reason} ({_where(error)})", file=sys.stderr)
            print(_KEPT, file=sys.stderr)
            return 1
        traceback.print_exc()
        print(f"crrelu {name}: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        print(_KEPT, file=sys.stderr)
        return 1


def _where(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return str(name) if name else " ".join(str(error).split())


def _silence_libraries() -> None:
    """Silences what libraries say about themselves and no user can act on."""
    # bitsandbytes says at every import, on a machine without a GPU, that an optional kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed prints this to stdout when it is imported, in front of a command's JSON.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # TRL itself sets options that transformers has renamed.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated")


def _without_debug(argv: list[str]) -> list[str]:
    """Removes `--debug`, and keeps it where every process sees it. The Trainer's own `--debug` has a value."""
    for index, argument in enumerate(argv):
        if argument == "--debug" and (index + 1 == len(argv) or index == 0 or argv[index + 1].startswith("-")):
            os.environ[_DEBUG] = "1"
            return argv[:index] + argv[index + 1 :]
    return argv


def _underscores(argv: list[str]) -> list[str]:
    """`--output-dir x` and `--output-dir=x` become TRL's spelling, `--output_dir`."""
    result = []
    for argument in argv:
        if argument.startswith("--") and len(argument) > 2:
            option, equals, value = argument.partition("=")
            argument = "--" + option[2:].replace("-", "_") + equals + value
        result.append(argument)
    return result
