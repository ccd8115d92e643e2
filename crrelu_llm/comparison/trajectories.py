"""How the difference from the baseline develops over training, from the evaluations that the trainer logged."""

from collections.abc import Iterable
from typing import Any

from crrelu_llm.comparison.statistics import compare_metric

METRIC = "eval_loss"


def trajectories(pairs: Iterable[tuple[str, dict[str, Any], list[Any]]], baseline: str) -> list[dict[str, Any]]:
    """The paired difference in evaluation loss at every step at which all runs of a pair were evaluated.

    Args:
        pairs: Candidate, grid values, and the `(baseline, candidate)` runs of each seed, with their `history`.
        baseline: The baseline's name.

    Returns:
        `{candidate, grid, points: [{step, difference, ci_low, ci_high, n}]}` each, in nats, paired over the seeds
        (Student's interval; None of a single seed); empty where the recipe has no `eval_strategy`.
    """
    found = []
    for candidate, grid, runs in pairs:
        logs = [[_losses(run) for run in pair] for pair in runs]
        steps = sorted(set.intersection(*(set(log) for pair in logs for log in pair)))
        points = []
        for step in steps:
            before, after = ([pair[side][step] for pair in logs] for side in (0, 1))
            entry = compare_metric(
                METRIC, False, before, after, "seed", baseline_name=baseline, candidate_name=candidate
            )
            points.append({"step": step} | {key: entry[key] for key in ("difference", "ci_low", "ci_high", "n")})
        if points:
            found.append({"candidate": candidate, "grid": grid, "points": points})
    return found


def _losses(run: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry[METRIC] for entry in run["history"] if entry.get(METRIC) is not None}
