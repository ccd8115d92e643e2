"""Shared by the pages: the verdict's type, and look-ups of arms, runs, grid values and metrics in a report."""

import statistics
from dataclasses import dataclass, field

from crrelu_llm.report.schema import Arm, Grid, Metric, Report, Run
from crrelu_llm.statistics.paired import Comparison, Outcome

_CONTROLS = ("native", "relu")


@dataclass
class Verdict:
    """A verdict: the sentence, its outcome, and the arm and grid value that it is about.

    If the verdict rests on one comparison, it has this comparison and the number of its seeds.
    """

    sentence: str
    outcome: Outcome = "undecided"
    candidate: str | None = None
    grid: Grid = field(default_factory=dict)
    comparison: Comparison | None = None
    seeds: int = 0


def is_evaluation(report: Report) -> bool:
    """Whether the report is from `crrelu eval`: checkpoints, without training runs."""
    return report.trainer == "eval"


def candidates(report: Report) -> list[str]:
    """The arms for the verdict: CRReLU arms, else arms that are not controls, else all; never the baseline."""
    others = [arm for arm in report.arms if arm.arm != report.baseline]
    for wanted in (
        [arm.arm for arm in others if arm.activation == "crrelu"],
        [arm.arm for arm in others if arm.arm not in _CONTROLS],
    ):
        if wanted:
            return wanted
    return [arm.arm for arm in others]


def grids(report: Report) -> list[Grid]:
    """The grid values of the runs, in order of appearance; `[{}]` without a grid."""
    found: list[Grid] = []
    for run in everything(report):
        if run.grid not in found:
            found.append(run.grid)
    return found or [{}]


def everything(report: Report) -> list[Run]:
    """The runs of all arms, finished or not."""
    return [run for arm in report.arms for run in arm.runs]


def runs(arm: Arm | None, grid: Grid, finished: bool = True) -> list[Run]:
    """An arm's runs at a grid value, by default only the finished ones."""
    return [run for run in (arm.runs if arm else []) if run.grid == grid and (run.done or not finished)]


def by_seed(arm: Arm | None, grid: Grid, metric: str) -> dict[int, float]:
    """The value of a metric by seed, for the finished runs that have one."""
    values = {run.seed: run.metrics.get(metric) for run in runs(arm, grid)}
    return {seed: value for seed, value in values.items() if value is not None}


def of_runs(done: list[Run]) -> tuple[float | None, float | None, int | None]:
    """Mean training seconds, mean tokens per second, and the largest peak memory in bytes."""
    times = [run.train_seconds for run in done if run.train_seconds is not None]
    speeds = [run.tokens_per_second for run in done if run.tokens_per_second is not None]
    peaks = [run.peak_memory_bytes for run in done if run.peak_memory_bytes is not None]
    seconds, speed = (statistics.fmean(column) if column else None for column in (times, speeds))
    return seconds, speed, max(peaks, default=None)


def find_arm(report: Report, name: str | None) -> Arm | None:
    """The arm of that name, or None."""
    return next((arm for arm in report.arms if arm.arm == name), None)


def metrics(report: Report) -> dict[str, Metric]:
    """All metrics, described in the report or only measured."""
    measured = [name for run in everything(report) for name in run.metrics]
    return {name: describe(report, name) for name in [*report.metrics, *measured]}


def describe(report: Report, metric: str) -> Metric:
    """The description of one metric, even if no run has it."""
    return report.metrics.get(metric) or Metric(label=metric.replace("_", " "))


def paired_over(report: Report, entry: Comparison) -> str:
    """The pairs of a comparison and their number: `3 seeds`, `60 documents`, `60 documents × 3 seeds`."""
    if entry.unit == "seed":
        return f"{entry.n} seed{'s' if entry.n != 1 else ''}"
    items = f"{entry.n} {report.items}"
    return f"{items} × {entry.n_seeds} seeds" if entry.unit == "both" else items
