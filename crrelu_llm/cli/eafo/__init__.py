"""`crrelu eafo …`: the entropy method, one small file a subcommand."""

import importlib

from crrelu_llm.cli.parser import Parser

# subcommand -> (module in crrelu_llm.cli.eafo, one-line help)
COMMANDS = {
    "derive": ("derive", "the correction of an activation for a density: formula, LaTeX, where it does not apply"),
    "plot": ("plot", "activation, derivative, correction, density and entropy as a picture"),
    "fit": ("fit", "the density of every site's pre-activations, and the correction that it gives"),
    "rank": ("rank", "the entropy after every site for many activations, and whether it predicts the loss"),
    "epsilon": ("epsilon", "how much the start value of ε matters: a comparison over many, with a picture"),
}


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu eafo",
        description="Entropy-based Activation Function Optimization: derive, measure and learn activations.",
        epilog="example: crrelu eafo derive --activation relu --density normal",
    )
    subparsers = parser.add_subparsers(dest="what", metavar="|".join(COMMANDS), required=True)
    for name, (_, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    if argv and argv[0] in COMMANDS:
        module = importlib.import_module(f"crrelu_llm.cli.eafo.{COMMANDS[argv[0]][0]}")
        return module.run(argv[1:]) or 0
    parser.parse_args(argv)
    return 0
