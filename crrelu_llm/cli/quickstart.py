"""`crrelu quickstart`: a small comparison with the embedded model and data, offline."""

import argparse
import os
import sys
import time
from pathlib import Path

from crrelu_llm.cli.parser import Parser

ARMS = ["native", "relu", "crrelu:calibration=none", "crrelu"]
# `--fast`: two seeds, fewer steps, less held-out text.
_FAST_SEEDS, _FAST_STEPS, _FAST_TEST = [0, 1], 5, "test[:25%]"
# Set while the command runs, unless the user has set them: no bars (tqdm reads this when it is imported), and no
# compiled loops, which take longer to compile than a model of this size takes to train.
_VARIABLES = {"TQDM_DISABLE": "1", "CRRELU_BACKEND": "eager"}


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu quickstart",
        description="Fine-tune the embedded nano GPT-2 (GELU) with its own activation, with ReLU, with the paper's "
        "plain swap to CRReLU, and with CRReLU calibrated to the model, 3 seeds each. Then write the report. Works "
        "offline, in minutes on a laptop's CPU.",
        epilog="example: crrelu quickstart --output_dir my-first-comparison",
    )
    parser.add_argument("--output_dir", default="crrelu-quickstart", help="default: crrelu-quickstart")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    fast = f"seeds 0 and 1, {_FAST_STEPS} steps each, half the held-out text"
    parser.add_argument("--fast", action="store_true", help=fast)
    args = parser.parse_args(argv)
    ours = {name: value for name, value in _VARIABLES.items() if name not in os.environ}
    os.environ |= ours
    try:
        return _run(args, argv)
    finally:
        for name in ours:
            del os.environ[name]


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    import shlex

    from crrelu_llm.cli.compare import arguments, run_matrix, write
    from crrelu_llm.recipes_path import recipes_dir

    started = time.perf_counter()
    recipe = ["--config", str(recipes_dir() / "nano" / "sft.yaml")]
    recipe += ["--max_steps", str(_FAST_STEPS), "--dataset_test_split", _FAST_TEST] if args.fast else []
    asked = arguments(
        kind="sft",
        arms=ARMS,
        seeds=args.seeds or (_FAST_SEEDS if args.fast else [0, 1, 2]),
        output_dir=args.output_dir,
        baseline="native",
        discard_models=True,
    )
    failed = run_matrix(asked, recipe, shlex.join(["crrelu", "quickstart", *argv]), calm=True)
    write(Path(args.output_dir))
    print(_summary(Path(args.output_dir) / "report.json"))
    print(f"report: {Path(args.output_dir) / 'report.html'}")
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if failed:
        print(f"crrelu quickstart: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _summary(path: Path) -> str:
    """The results as a small table, and the verdict."""
    from crrelu_llm.columns import aligned
    from crrelu_llm.report import text
    from crrelu_llm.report.contents import by_seed, find_arm
    from crrelu_llm.report.headline import headline
    from crrelu_llm.report.pages import page_of
    from crrelu_llm.report.schema import Report
    from crrelu_llm.report.tables import decisive_entries

    report = Report.read(path)
    entries = {entry.candidate: entry for entry in decisive_entries(report)}
    rows = [("", "loss before", "after", "difference from native", "95 % interval")]
    for name in ARMS:
        arm, entry = find_arm(report, name), entries.get(name)
        losses = list(by_seed(arm, {}, "loss").values())
        rows.append(
            (
                name,
                text.number(arm.before.get("loss") if arm else None, "{:.4f}"),
                text.spread(losses, "{:.4f}") if losses else text.MISSING,
                text.signed(entry.difference, "{:.4f}") if entry else "",
                text.interval(entry.ci_low, entry.ci_high, "{:.4f}") if entry else "",
            )
        )
    return "\n".join([*aligned(rows), "", headline(report, page_of(report).draw(report)) + "."])
