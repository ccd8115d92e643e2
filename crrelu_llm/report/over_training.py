"""The report's table and figure of the difference from the baseline during training."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from crrelu_llm.report import text
from crrelu_llm.report.drawing import Picture, arm_key, line_style, new_axes
from crrelu_llm.report.schema import Grid, Point, Report, Trajectory
from crrelu_llm.report.svg import GOOD, MUTED, inline_svg
from crrelu_llm.report.tables import Cell, Table

_FORMAT = "{:.4f}"
_MOST_ROWS = 10


def metric(report: Report) -> str:
    """The name of the metric in words."""
    return f"evaluation {report.trajectory.metric}"


def table(report: Report) -> Table:
    """A row for each candidate (and grid value), a column for each step, or for some evenly spaced steps."""
    shown = report.trajectories
    steps = sorted({point.step for entry in shown for point in entry.points})
    if len(steps) > _MOST_ROWS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, _MOST_ROWS).round().astype(int)]
    made = Table(["candidate", *(f"step {step}" for step in steps)])
    for entry in shown:
        label = ", ".join(filter(None, (entry.candidate, text.grid_label(entry.grid))))
        points = {point.step: point for point in entry.points}
        cells = [Cell(text.MISSING if step not in points else _cell(points[step])) for step in steps]
        made.rows.append([Cell(label, arm=entry.candidate), *cells])
    return made


def _cell(point: Point) -> str:
    ends = text.interval(point.ci_low, point.ci_high, _FORMAT)
    return text.signed(point.difference, _FORMAT) + ("" if ends == text.MISSING else f" ({ends})")


def pictures(report: Report) -> list[Picture]:
    """A figure for each grid value with at least two steps."""
    entries = [entry for entry in report.trajectories if len(entry.points) > 1]
    values: list[Grid] = []
    for entry in entries:
        if entry.grid not in values:
            values.append(entry.grid)
    return [_picture(report, [e for e in entries if e.grid == grid], grid, i) for i, grid in enumerate(values)]


def _picture(report: Report, entries: list[Trajectory], grid: Grid, index: int) -> Picture:
    figure, axes = new_axes(3.0)
    what = metric(report)
    for entry in entries:
        steps = [point.step for point in entry.points]
        style = line_style(report, entry.candidate)
        low, high = [point.ci_low for point in entry.points], [point.ci_high for point in entry.points]
        if None not in (*low, *high):
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.14, linewidth=0)
        axes.plot(steps, [point.difference for point in entry.points], marker="o", markersize=3, **style)
    axes.axhline(0, color=MUTED, linewidth=1)
    bottom, top = axes.get_ylim()
    bottom, top = min(bottom, 0.0), max(top, 0.0)
    better = (0, top) if report.trajectory.higher_is_better else (bottom, 0)
    axes.axhspan(*better, color=GOOD, alpha=0.1, linewidth=0)
    axes.set(ylim=(bottom, top), xlabel="step", ylabel=f"difference in {what}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = [entry.candidate for entry in entries]
    label = f" ({text.grid_label(grid)})" if grid else ""
    return Picture(
        f"over{index}",
        f"Difference from {report.baseline} over training{label}",
        f"Candidate minus baseline in {what}: mean and Student's 95 % interval over seeds; the shaded side is better.",
        f"Difference in {what} from {report.baseline} by step{label} for {', '.join(names)}.",
        inline_svg(figure, f"over{index}"),
        [arm_key(report, name) for name in names],
    )
