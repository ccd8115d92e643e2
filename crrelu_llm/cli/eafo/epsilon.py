"""`crrelu eafo epsilon`: one recipe with many start values of ε, frozen and learned, as a comparison."""

import contextlib
import json
import shlex
import sys
from pathlib import Path

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser

DOCUMENT = "epsilon.json"
_DEFAULT = (-1.0, -0.5, -0.1, -0.01, 0.0, 0.01, 0.1, 0.5, 1.0)


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eafo epsilon",
        description="Fine-tune (SFT) with many start values of ε, each frozen, learned per layer and learned per "
        "channel, and fine-tune the model as it is beside them. A frozen ε gives the same function per layer and per "
        "channel, so it is trained once. There is no calibration, which would overwrite the start value. Finished "
        "runs are kept: the same command goes on where it stopped, and you can add values. The command writes "
        f"epsilon.json, epsilon.png and the report of `crrelu compare`. {options.OTHERS}",
        epilog="example: crrelu eafo epsilon --config recipes/eafo/epsilon.yaml --values -1 -0.01 0 0.01 1 "
        "--output_dir epsilon",
    )
    add = parser.add_argument
    options.add_recipe(parser)
    default = " ".join(f"{value:g}" for value in _DEFAULT)
    text = f"start values of ε; write small ones out, as -0.001 (default: {default})"
    add("--values", nargs="+", type=float, default=list(_DEFAULT), metavar="V", help=text)
    options.add_seeds(parser, (0,))
    add("--output_dir", required=True, help="directory of the study")
    add("--keep_models", action="store_true", help="also keep the trained models")
    options.add_json(parser)
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args, rest = _parser().parse_known_args(argv)
    from crrelu_llm.cli.compare import arguments, run_matrix
    from crrelu_llm.comparison.results import build_report
    from crrelu_llm.files import plain, write_json
    from crrelu_llm.report import write_report
    from crrelu_llm.secrets import without_secrets
    from crrelu_llm.studies import sensitivity, sensitivity_plot
    from crrelu_llm.training.arguments import parse

    recipe_argv = ["--config", args.config, *rest]
    arms = sensitivity.arm_names(args.values)
    recipe = parse("sft", recipe_argv)
    sensitivity.check_recipe(recipe.values, recipe.source)
    comparison = arguments(
        kind="sft",
        arms=arms,
        seeds=args.seeds,
        output_dir=args.output_dir,
        baseline="native",
        discard_models=not args.keep_models,
    )
    command = shlex.join(["crrelu", "eafo", "epsilon", *without_secrets(argv)])
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its logs; only the result goes to stdout
        failed = run_matrix(comparison, recipe_argv, command)
    directory = Path(args.output_dir)
    report = write_report(build_report(directory), directory)
    document = plain(sensitivity.study(report))
    write_json(directory / DOCUMENT, document)
    sensitivity_plot.plot(document, directory / sensitivity_plot.PLOT)
    print(json.dumps(document, indent=2, ensure_ascii=False) if args.json else sensitivity.text(document))
    print(f"saved to {directory}", file=sys.stderr)
    if failed:
        print(f"crrelu eafo epsilon: {failed}", file=sys.stderr)
    return 1 if failed else 0
