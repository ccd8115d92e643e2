"""`crrelu eafo plot`: a picture of an activation, its derivative, correction, density and entropy along ε."""

import sys
from pathlib import Path

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError

_FORMATS = (".png", ".svg", ".pdf")


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eafo plot",
        description="Draw an activation with its correction for some ε, the derivatives, the correction with the "
        "intervals where it does not apply, the density, and the entropy of the output along ε.",
        epilog="example: crrelu eafo plot --activation relu --density normal --output relu.svg",
    )
    add = parser.add_argument
    add("--activation", default="relu", metavar="A", help="as for `crrelu eafo derive`")
    add("--density", default="normal", metavar="P", help="as for `crrelu eafo derive`")
    add("--values", nargs="+", type=float, default=[-1.0, -0.3, 0.3, 1.0], metavar="V",
        help="the values of ε to draw, factors of the correction (default: -1 -0.3 0.3 1)")  # fmt: skip
    text = f"the picture; the ending says the format: {' '.join(_FORMATS)}"
    add("--output", required=True, metavar="FILE", help=text)
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    path = Path(args.output)
    if path.suffix not in _FORMATS:
        raise InputError(f"--output {path}: the ending must be one of {' '.join(_FORMATS)}")
    if not all(abs(value) <= 1e6 for value in args.values):
        raise InputError(f"--values must be finite numbers, not {' '.join(map(str, args.values))}")
    options.writable(str(path.parent), path.name, option="--output")
    from crrelu_llm.eafo import activations, parsing
    from crrelu_llm.eafo.correction import correct
    from crrelu_llm.eafo.correction_plot import plot

    plot(correct(activations.named(args.activation), parsing.density(args.density)), args.values, path)
    print(f"saved to {path}", file=sys.stderr)
    return 0
