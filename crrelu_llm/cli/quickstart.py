"""`crrelu quickstart`: the main job on the embedded model and data, offline."""

import argparse
import sys
import time

from crrelu_llm.cli.parser import Parser

ARMS = ["native", "relu", "crrelu:calibration=none", "crrelu"]


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu quickstart",
        description="Fine-tune the embedded nano GPT-2 (GELU) with its own activation, ReLU, CRReLU swapped plainly "
        "as in the paper, and CRReLU calibrated to the model; 3 seeds each; then write the report. Offline, minutes "
        "on a laptop's CPU.",
        epilog="example: crrelu quickstart --output_dir my-first-comparison",
    )
    parser.add_argument("--output_dir", default="crrelu-quickstart", help="default: crrelu-quickstart")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    args = parser.parse_args(argv)
    import shlex

    from crrelu_llm.cli.compare import compare
    from crrelu_llm.recipes_path import recipes_dir

    started = time.perf_counter()
    recipe = recipes_dir() / "nano" / "sft.yaml"
    arguments = argparse.Namespace(
        kind="sft",
        arms=ARMS,
        seeds=args.seeds,
        output_dir=args.output_dir,
        baseline="native",
        grid=[],
        tune=[],
        patched_dir=None,
        after=None,
        discard_models=True,
    )
    status = compare(arguments, ["--config", str(recipe)], shlex.join(["crrelu", "quickstart", *argv]))
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return status
