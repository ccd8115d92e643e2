"""`crrelu eval`: checkpoints side by side on a suite of tasks, with paired statistics and a report."""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError

if TYPE_CHECKING:
    from crrelu_llm.evaluation.models import NamedModel

_DTYPES = ("float32", "bfloat16", "float16", "auto")


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eval",
        description="Evaluate checkpoints on tasks of lm-evaluation-harness, on the same tasks from local files, on "
        "preference pairs or on text, and compare them item by item. Finished results are kept: the same command "
        "continues where it stopped.",
        epilog="example: crrelu eval --models native=HuggingFaceTB/SmolLM2-135M-Instruct crrelu=patched --suite local "
        "--data_dir data --output_dir evaluation",
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=MODEL",
        help="a name, and a hub name, directory (also of an adapter), .gguf file or builtin:nano")  # fmt: skip
    add("--suite", required=True, metavar="S", help="standard, local, preference, language-modelling, or a YAML file")
    add("--data_dir", metavar="D", help="directory of the data files of local tasks (see eval/README.md)")
    add("--data", nargs="+", metavar="FILE", help="data files for the suites preference and language-modelling")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of the suite")
    add("--limit", type=options.count, metavar="N", help="at most N items of each task, spread over its groups")
    add("--baseline", metavar="NAME", help="the model to compare with (default: gelu, else native, else the first)")
    add("--reference", metavar="NAME", help="the reference model for the rewards of preference pairs")
    add("--beta", type=_beta, default=0.1, help="beta of DPO, for these rewards (default: 0.1)")
    add("--output_dir", required=True, metavar="D", help="directory for the results and report.{html,md,json}")
    add("--batch_size", type=_batch_size, default="auto", metavar="N", help="rows per batch (default: auto)")
    add("--max_length", type=options.count, metavar="N", help="at most N tokens of context (default: the model's own)")
    add("--apply_chat_template", action="store_true", help="render prompts with the model's chat template")
    add("--dtype", choices=_DTYPES, help=f"dtype to load the models in {options.OWN_DTYPE}")
    options.add_device(parser)
    options.add_json(parser, "the verdict", what="report.json")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when imported; a log needs one line per task
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise InputError(f"--data_dir {args.data_dir}: no such directory")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: a file has this name; give a directory")
    if (output_dir / "comparison.json").is_file():
        raise InputError(f"--output_dir {output_dir} holds a comparison; give another directory")
    from crrelu_llm.evaluation.suites import read_suite

    specs = read_suite(args.suite, args.tasks, args.data)
    models = _models(args)
    _require_lm_eval()
    from crrelu_llm.cli.compare import write
    from crrelu_llm.quiet import quieten_libraries

    quieten_libraries()
    from crrelu_llm.evaluation.prepare import Evaluation
    from crrelu_llm.evaluation.run import run_evaluation, say_alone
    from crrelu_llm.secrets import without_secrets

    say_alone()
    device, names = options.device(args.device), [model.name for model in models]
    dtype, why = (args.dtype, None) if args.dtype else _dtype(models, device, output_dir)
    evaluation = Evaluation(
        models=models,
        specs=specs,
        output_dir=output_dir,
        baseline=args.baseline or next((name for name in ("gelu", "native") if name in names), names[0]),
        reference=args.reference,
        beta=args.beta,
        suite=args.suite if Path(args.suite).suffix == "" else Path(args.suite).stem,
        data_dir=None if args.data_dir is None else Path(args.data_dir),
        limit=args.limit,
        chat=args.apply_chat_template,
        dtype=dtype,
        why_dtype=why,
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=device,
        command=shlex.join(["crrelu", "eval", *without_secrets(argv)]),
    )
    with run_evaluation(evaluation) as failures:
        verdict = write(output_dir)
    print((output_dir / "report.json").read_text() if args.json else verdict)
    for name, tasks in failures.items():
        print(f"crrelu eval: {name} failed on {', '.join(tasks)}; the other results are kept", file=sys.stderr)
    return 1 if failures else 0


def _models(args: argparse.Namespace) -> "list[NamedModel]":
    """The models, checked to include the baseline and the reference."""
    from crrelu_llm.evaluation.models import parse_models

    models = parse_models(args.models)
    names = [model.name for model in models]
    for option in ("baseline", "reference"):
        name = getattr(args, option)
        if name is not None and name not in names:
            raise InputError(f"--{option} {name} is not one of the models: {' '.join(names)}")
    return models


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed: pip install 'lm-eval[ifeval]'")


def _dtype(models: "list[NamedModel]", device: str, output_dir: Path) -> tuple[str, str | None]:
    """The default dtype to load the models in, and the reason; a continued evaluation keeps its dtype."""
    from crrelu_llm.evaluation.results import read_settings
    from crrelu_llm.patching import loading
    from crrelu_llm.precision import choose_dtype

    with contextlib.suppress(InputError):
        return read_settings(output_dir).dtype, None
    return choose_dtype([loading.load_config(model.base) for model in models], device)


def _beta(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else options.count(text)
