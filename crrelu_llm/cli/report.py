"""`crrelu report`: rebuilds the report of a comparison or an evaluation from what is on disk."""

from pathlib import Path

from crrelu_llm.cli.parser import Parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu report",
        description="Rebuild report.html, report.md and report.json of a comparison or an evaluation from its files.",
        epilog="example: crrelu report comparison",
    )
    parser.add_argument("directory", metavar="D", help="output_dir of `crrelu compare` or `crrelu eval`")
    parser.add_argument("--json", action="store_true", help="print report.json too")
    args = parser.parse_args(argv)
    from crrelu_llm.cli.compare import write

    directory = Path(args.directory)
    verdict = write(directory)
    print((directory / "report.json").read_text() if args.json else verdict)
    return 0
