"""`crrelu eafo derive`: the correction of an activation for a density, as formulas."""

import json
import sys

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser

ALL_DENSITIES = (
    "normal",
    "normal(0.5,2)",
    "logistic",
    "laplace",
    "student_t(5)",
    "0.5*normal(-1,1) + 0.5*normal(1,1)",
)


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eafo derive",
        description="The first-order correction of an activation for a density of its inputs: the forward and the "
        "inverse form, with LaTeX, the extension to the whole line, and where the theory does not apply and why.",
        epilog="example: crrelu eafo derive --activation relu --density normal",
    )
    add = parser.add_argument
    add("--activation", default="relu", metavar="A",
        help="relu, leaky_relu, elu, silu, gelu, tanh, …, crrelu(0.1), or all (default: relu)")  # fmt: skip
    add("--density", default="normal", metavar="P",
        help="normal(0.5,2), logistic, laplace, student_t(5), a sum like 0.3*normal(-1,1) + 0.7*laplace, "
        "samples:FILE.npy, or all (default: normal)")  # fmt: skip
    add(
        "--output_dir",
        metavar="D",
        help="also write derivation.json and derivation.tex to this directory",
    )
    options.add_json(parser, "text")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    directory = args.output_dir and options.writable(args.output_dir, "derivation.json", "derivation.tex")
    from tqdm.auto import tqdm

    from crrelu_llm.eafo import activations, derivation, parsing
    from crrelu_llm.eafo.correction import correct
    from crrelu_llm.files import plain, write_json, write_text

    chosen = activations.NAMES if args.activation == "all" else (args.activation,)
    densities = ALL_DENSITIES if args.density == "all" else (args.density,)
    pairs = [(activations.named(name), parsing.density(text)) for text in densities for name in chosen]
    bar = tqdm(pairs, desc="Deriving", unit="pair", disable=len(pairs) == 1 or not sys.stderr.isatty())
    documents = [derivation.document(correct(activation, density)) for activation, density in bar]
    if directory is not None:
        write_json(directory / "derivation.json", plain(documents))
        write_text(directory / "derivation.tex", _latex(documents))
    if args.json:
        print(json.dumps(plain(documents if len(documents) > 1 else documents[0]), indent=2, ensure_ascii=False))
    elif len(documents) > 1:
        print("\n".join(map(derivation.summary, documents)))
    else:
        print(derivation.text(documents[0]))
        if documents[0]["latex"]:
            print(f"  LaTeX          {documents[0]['latex']}")
    if directory is not None:
        print(f"saved to {directory}", file=sys.stderr)
    return 0


def _latex(documents: list[dict[str, object]]) -> str:
    return "\n".join(
        f"% {found['activation']} for {found['density']}\n\\[ {found['latex']} \\]\n"
        for found in documents
        if found["latex"]
    )
