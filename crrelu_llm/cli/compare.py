"""`crrelu compare`: arms × seeds of one recipe, evaluation, statistics, report."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError
from crrelu_llm.files import alone
from crrelu_llm.training.kinds import KINDS


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu compare",
        description="Train one recipe with several activations and seeds, and compare the results. Finished runs are "
        f"kept: the same command continues where it stopped. {options.OTHERS}",
        epilog="example: crrelu compare dpo --config recipes/smollm2-135m/dpo/config_full.yaml "
        "--arms gelu crrelu crrelu:calibration=fit --seeds 0 1 2 --output_dir comparison",
    )
    add = parser.add_argument
    add("kind", choices=tuple(KINDS), metavar="|".join(KINDS), help="the trainer")
    options.add_recipe(parser)
    add("--arms", nargs="+", required=True, help="each arm: native, or ACTIVATION[:option=value...]")
    options.add_seeds(parser, (0, 1, 2))
    add("--output_dir", required=True, help="directory of the comparison")
    add("--baseline", help="the arm to compare the others with (default: gelu, else native, else the first)")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="repeat the runs for each value of a recipe key",
    )
    add(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="choose a training key (learning_rate, ...) for each arm separately, on held-out training rows",
    )
    add("--after", help="start each run from the model that this other comparison trained with the same arm and seed")
    add("--patched_dir", help="directory of the patched models, to share with other comparisons (default: output_dir)")
    add("--discard_models", action="store_true", help="keep metrics and reports, but no trained models")
    return parser


def arguments(**given: Any) -> argparse.Namespace:
    """The arguments of a comparison that another command runs, with defaults for those not given."""
    return argparse.Namespace(**{action.dest: action.default for action in _parser()._actions} | given)


def run(argv: list[str]) -> int:
    """Runs the command."""
    args, rest = _parser().parse_known_args(argv)
    from crrelu_llm.secrets import without_secrets

    status = _launched(argv, args.config)
    if status is not None:
        return status
    return compare(args, ["--config", args.config, *rest], shlex.join(["crrelu", "compare", *without_secrets(argv)]))


def compare(args: argparse.Namespace, recipe_argv: list[str], command: str) -> int:
    """Runs a comparison and writes its report, even if some runs failed."""
    failed = run_matrix(args, recipe_argv, command)
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(write(Path(args.output_dir)))
        if failed:
            print(f"crrelu compare: {failed}", file=sys.stderr)
    return 1 if failed else 0


def run_matrix(args: argparse.Namespace, recipe_argv: list[str], command: str, calm: bool = False) -> Exception | None:
    """Runs a comparison without its report; returns the error if some runs failed."""
    if len(set(args.seeds)) != len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise InputError(f"--seeds must be different whole numbers of 0 or more, not {' '.join(map(str, args.seeds))}")
    from crrelu_llm.comparison.arms import check_baseline, parse_arms, parse_grid
    from crrelu_llm.comparison.definition import Comparison
    from crrelu_llm.comparison.matrix import RunsFailed, run_comparison
    from crrelu_llm.comparison.tuning import parse_tune
    from crrelu_llm.quiet import quieten_libraries

    quieten_libraries()
    arms = parse_arms(args.arms)
    check_baseline(arms, args.baseline)
    comparison = Comparison(
        kind=args.kind,
        argv=recipe_argv,
        arms=arms,
        seeds=args.seeds,
        points=parse_grid(args.grid),
        baseline=args.baseline,
        output_dir=Path(args.output_dir),
        command=command,
        keep_models=not args.discard_models,
        tune=parse_tune(args.tune),
        patched_dir=Path(args.patched_dir) if args.patched_dir else None,
        after=Path(args.after) if args.after else None,
        calm=calm,
    )
    try:
        run_comparison(comparison)
    except RunsFailed as error:
        return error
    return None


def _launched(argv: list[str], config: str) -> int | None:
    """Runs the command on several processes if launch options say so; returns the exit status, or else None."""
    from crrelu_llm.training.arguments import make_parser, read_recipe
    from crrelu_llm.training.launch import relaunch_if_asked

    kind = next((word for word in argv if word in KINDS), "sft")
    own = {action.dest for parser in (_parser(), make_parser(kind)) for action in parser._actions}
    return relaunch_if_asked(["compare"], argv, read_recipe(["--config", config])[1], own)


def write(output_dir: Path, margins: dict[str, float] | None = None, with_examples: bool = True) -> str:
    """Builds the report of a comparison or an evaluation from its files and writes it; returns its verdict.

    Raises:
        InputError: The directory does not exist, has neither of the two, or has a damaged file.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir}: no such directory; give the output_dir of `crrelu compare` or `crrelu eval`")
    with alone(output_dir, "crrelu report", ".report.lock"):
        return _write(output_dir, margins, with_examples)


def _write(output_dir: Path, margins: dict[str, float] | None, with_examples: bool) -> str:
    from crrelu_llm.comparison import results, settings
    from crrelu_llm.evaluation import report as evaluations
    from crrelu_llm.evaluation.results import SETTINGS
    from crrelu_llm.report import write_report
    from crrelu_llm.report.headline import headline
    from crrelu_llm.report.pages import page_of

    if (output_dir / SETTINGS).is_file():
        report = evaluations.build_report(output_dir, margins)
    elif not (output_dir / settings.SETTINGS).is_file():
        raise InputError(
            f"{output_dir} holds no comparison and no evaluation; give the output_dir of `crrelu compare` or "
            "`crrelu eval`"
        )
    else:
        report = results.build_report(output_dir, margins)
    if not with_examples:
        report = report.but(examples=[])
    report = write_report(report, output_dir)
    return f"{headline(report, page_of(report).draw(report))}\n{report.verdict}\nreport: {output_dir / 'report.html'}"
