"""The difference from the baseline during training, from the evaluations that the trainer logged."""

from collections.abc import Iterable

from crrelu_llm.report.schema import Grid, Point, Run, Trajectory
from crrelu_llm.statistics.paired import compare_metric


def trajectories(
    pairs: Iterable[tuple[str, Grid, list[tuple[Run, Run]]]], baseline: str, metric: str, higher_is_better: bool
) -> list[Trajectory]:
    """The paired difference in a logged metric, at each step at which all runs of baseline and candidate have it.

    Args:
        pairs: The candidate, the grid values, and the `(baseline, candidate)` runs of each seed.
        baseline: The baseline's name.
        metric: The name of the metric in the logs: `eval_loss`, `eval_reward`.
        higher_is_better: Whether a larger value is better.

    Returns:
        The differences, paired over seeds, with Student's interval (None for a single seed). Empty if the recipe has
        no `eval_strategy`.
    """
    found = []
    for candidate, grid, runs in pairs:
        logs = [[_logged(run, metric) for run in pair] for pair in runs]
        steps = sorted(set.intersection(*(set(log) for pair in logs for log in pair)))
        points = []
        for step in steps:
            before, after = ([pair[side][step] for pair in logs] for side in (0, 1))
            entry = compare_metric(
                metric, higher_is_better, before, after, "seed", baseline_name=baseline, candidate_name=candidate
            )
            ends = {"ci_low": entry.ci_low, "ci_high": entry.ci_high}
            points.append(Point(step=step, difference=entry.difference, **ends, n=entry.n))
        if points:
            found.append(Trajectory(candidate=candidate, grid=grid, points=points))
    return found


def _logged(run: Run, metric: str) -> dict[int, float]:
    return {entry["step"]: entry[metric] for entry in run.history if entry.get(metric) is not None}
