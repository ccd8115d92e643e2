"""How the difference from the baseline develops over training, from the evaluations that the trainer logged."""

from collections.abc import Iterable

from crrelu_llm.report.schema import Grid, Point, Run, Trajectory
from crrelu_llm.statistics.paired import compare_metric


def trajectories(
    pairs: Iterable[tuple[str, Grid, list[tuple[Run, Run]]]], baseline: str, metric: str, higher_is_better: bool
) -> list[Trajectory]:
    """The paired difference in a logged metric at every step at which all runs of a pair were evaluated.

    Args:
        pairs: Candidate, grid values, and the `(baseline, candidate)` runs of each seed.
        baseline: The baseline's name.
        metric: What the trainer logs of an evaluation: `eval_loss`, `eval_reward`.
        higher_is_better: Its direction.

    Returns:
        Paired over the seeds (Student's interval; None of a single seed); empty where the recipe has no
        `eval_strategy`.
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
