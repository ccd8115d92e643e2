"""One comparison, `crrelu compare sft|dpo`, with as many steps as fit: native, gelu, relu and crrelu, 3 seeds.

    train.py sft --model M --data D --work W --out O --seconds S [--most N] [--seeds ...] [OPTIONS OF THE RECIPE]

The number of steps comes from two short runs of the native arm; the first is a warm-up. The arms are then trained seed
by seed, so that a lack of time costs a seed, not an arm; the report covers the finished runs. Existing calibrated
starting points in W/patched are used, to save time.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARMS = ["native", "gelu", "relu", "crrelu"]
FEWEST, PROBE = 3, 3
SLOWER = 1.25  # the largest expected ratio of a swapped arm's time to the native arm's
REPORT_SECONDS = 12


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=("sft", "dpo"))
    for name in ("model", "data", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for the whole comparison")
    parser.add_argument("--most", type=int, default=200, help="steps of a run at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, options = parser.parse_known_args()  # unknown options belong to the recipe

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(args.seconds - REPORT_SECONDS)))
    work, out = Path(args.work), Path(args.out)
    recipe = ["--config", str(HERE / f"{args.kind}.yaml"), "--model_name_or_path", args.model]
    recipe += ["--dataset_name", args.data, *options]
    comparison = work / args.kind
    try:
        ended = started + args.seconds - REPORT_SECONDS
        fitting = _steps_that_fit(args.kind, recipe, work / f"{args.kind}-probe", ended, len(ARMS) * len(args.seeds))
        steps = min(args.most, fitting)
        print(f"train: {steps} steps per run", flush=True)
        recipe += ["--max_steps", str(steps)]
        status = 1 if _compare(args.kind, recipe, args.seeds, comparison, work / "patched") else 0
    except KeyboardInterrupt:
        print("train: out of time; the report covers the finished runs", flush=True)
        status = 0
    except Exception:  # the report of the finished runs is still wanted
        traceback.print_exc()
        status = 1
    signal.alarm(0)
    done = _finished(comparison, args.seeds)
    if not any(done.values()):
        print("train: no run was finished in this time", file=sys.stderr)
        return 1
    from crrelu_llm.cli.compare import write

    print(write(comparison, with_examples=False))
    for name in ("report.json", "report.md"):
        shutil.copyfile(comparison / name, out / name)
    print(f"train: finished runs: {', '.join(f'{arm} {count}' for arm, count in done.items())}")
    return status


def _steps_that_fit(kind: str, recipe: list[str], probe: Path, ended: float, runs: int) -> int:
    """Uses two probes to find the seconds per step, and the overhead of a run beside its steps."""
    shutil.rmtree(probe, ignore_errors=True)
    wall = 0.0
    for seed in (0, 1):
        before = time.monotonic()
        failed = _matrix(kind, [*recipe, "--max_steps", str(PROBE)], ["native"], [seed], probe)
        if failed is not None:
            raise failed
        wall = time.monotonic() - before
    taken = json.loads((probe / "native" / "seed-1" / "run.json").read_text())["train_seconds"]
    step, beside = taken / PROBE * SLOWER, max(0.0, wall - taken)
    left = ended - time.monotonic()
    steps = int((0.9 * left / runs - beside) / step)
    print(f"train: {step:.3f} s per step, {beside:.1f} s of overhead, {left:.0f} s left", flush=True)
    return max(FEWEST, steps)


def _compare(kind: str, recipe: list[str], seeds: list[int], comparison: Path, patched: Path) -> Exception | None:
    """Trains seed by seed; returns the error if runs failed."""
    _matrix(kind, recipe, ["native"], seeds[:1], comparison)  # makes the directory of this comparison
    from crrelu_llm.comparison.arms import arm_dir

    for arm in ARMS[1:]:
        target = arm_dir(comparison, arm, {}) / "patched"
        if (patched / arm).is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(patched / arm, target, copy_function=_link)
    failed = None
    for count in range(1, len(seeds) + 1):
        failed = _matrix(kind, recipe, ARMS, seeds[:count], comparison) or failed
    return failed


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def _matrix(kind: str, recipe: list[str], arms: list[str], seeds: list[int], output_dir: Path) -> Exception | None:
    from crrelu_llm.cli.compare import arguments, run_matrix

    args = arguments(kind=kind, arms=arms, seeds=seeds, output_dir=str(output_dir), discard_models=True)
    words = [kind, *recipe, "--arms", *arms, "--seeds", *map(str, seeds), "--output_dir", str(output_dir)]
    failed = run_matrix(args, recipe, " ".join(["crrelu compare", *words, "--discard_models"]))
    if failed is not None:
        print(f"train: {failed}", file=sys.stderr, flush=True)
    return failed


def _finished(comparison: Path, seeds: list[int]) -> dict[str, int]:
    from crrelu_llm.comparison.arms import arm_dir
    from crrelu_llm.comparison.matrix import is_done

    return {arm: sum(is_done(arm_dir(comparison, arm, {}) / f"seed-{seed}") for seed in seeds) for arm in ARMS}


if __name__ == "__main__":
    sys.exit(main())
