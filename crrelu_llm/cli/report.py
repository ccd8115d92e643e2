"""`crrelu report`: rebuilds the report of a comparison or an evaluation from its files."""

import argparse
from pathlib import Path

from crrelu_llm.cli.parser import Parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu report",
        description="Rebuild report.html, report.md and report.json of a comparison or an evaluation from its files.",
        epilog="example: crrelu report comparison --margin loss=0.005",
    )
    parser.add_argument("directory", metavar="D", help="output_dir of `crrelu compare` or `crrelu eval`")
    parser.add_argument("--margin", nargs="+", type=_margin, default=[], metavar="METRIC=VALUE",
        help="the largest negligible difference, for 'no worse' and 'equivalent' (default: 0.01 nats of loss, 1%% of "
        "the baseline's perplexity, 0.01 of an accuracy or a bit per byte)")  # fmt: skip
    parser.add_argument("--without_examples", action="store_true",
        help="leave out the texts of single items, for a report that you publish")  # fmt: skip
    parser.add_argument("--format", choices=("html", "md", "json", "csv"), help="print the report in this format "
        "instead of the verdict; csv: the metrics of every run, one a line")  # fmt: skip
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="as --format json")
    args = parser.parse_args(argv)
    from crrelu_llm.cli.compare import write

    directory = Path(args.directory)
    verdict = write(directory, dict(args.margin), not args.without_examples)
    if args.format == "csv":
        from crrelu_llm.report.render import render_csv
        from crrelu_llm.report.schema import Report

        print(render_csv(Report.read(directory / "report.json")), end="")
    else:
        print((directory / f"report.{args.format}").read_text(encoding="utf-8") if args.format else verdict)
    return 0


def _margin(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    try:
        margin = float(value)
    except ValueError:
        margin = 0.0
    if not metric or not 0 < margin < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=VALUE with a number above 0, such as loss=0.01")
    return metric, margin
