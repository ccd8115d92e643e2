"""The report's figures of differences from the baseline: the forest plot, and the changes of single items."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crrelu_llm.report import text
from crrelu_llm.report.contents import describe, paired_over
from crrelu_llm.report.drawing import WIDTH, Key, Picture, arm_key
from crrelu_llm.report.schema import Grid, Report
from crrelu_llm.report.svg import GOOD, MUTED, PAPER, arm_colour, inline_svg
from crrelu_llm.report.tables import arm_slot
from crrelu_llm.statistics.paired import Comparison
from crrelu_llm.statistics.single_items import Change

_LONGEST_FOREST = 40
_MOST_PANELS = 12


def forest(report: Report) -> Picture | None:
    """The paired differences with their intervals, a panel for each metric."""
    panels: dict[str, list[Comparison]] = {}
    for entry in report.comparisons:
        if entry.difference is not None and not describe(report, entry.metric).reference:
            panels.setdefault(entry.metric, []).append(entry)
    order = sorted(panels, key=lambda metric: metric != report.headline.metric)
    if sum(map(len, panels.values())) > _LONGEST_FOREST:
        order = order[:1]
    if not order:
        return None
    heights = [0.75 + 0.17 * _forest_lines(panels[metric]) for metric in order]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(order), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric in zip(all_axes, order, strict=True):
        _forest_panel(axes, report, metric, panels[metric])
    shown = [entry for metric in order for entry in panels[metric]]
    units = {entry.unit for entry in shown}
    marks = {
        "both": Key(f"over {report.items} and seeds", "--muted", mark="disc"),
        "item": Key(f"over {report.items}", "--muted", mark="dot"),
        "seed": Key("over seeds", "--muted", mark="ring"),
    }
    confidence = f"{shown[0].confidence:.0%}"
    return Picture(
        "forest",
        f"Paired difference from {report.baseline}",
        f"Candidate minus baseline with the {confidence} interval; the shaded side is better.",
        "; ".join(
            f"{describe(report, entry.metric).label} of {entry.candidate} over {paired_over(report, entry)}: "
            f"{text.signed(entry.difference, describe(report, entry.metric).format)}"
            for entry in shown
        ),
        inline_svg(figure, "forest"),
        [marks[unit] for unit in marks if unit in units],
    )


def _forest_groups(entries: list[Comparison]) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for entry in sorted(entries, key=lambda entry: entry.unit):
        grid = text.grid_label(entry.grid)
        groups.setdefault(entry.candidate + (f", {grid}" if grid else ""), []).append(entry)
    return groups


def _forest_lines(entries: list[Comparison]) -> float:
    return sum(1.15 + len(group) for group in _forest_groups(entries).values())


def _forest_panel(axes: Axes, report: Report, metric: str, entries: list[Comparison]) -> None:
    description = describe(report, metric)
    scale = 100.0 if description.format.endswith("%}") else 1.0
    y, values = 0.0, [0.0]
    for label, group in _forest_groups(entries).items():
        clear = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1}
        place = axes.get_yaxis_transform()
        axes.text(0.0, -y, label, transform=place, va="center", fontsize=8.5, zorder=5, bbox=clear)
        for entry in group:
            y += 1
            colour = arm_colour(arm_slot(report, entry.candidate) or 0)
            difference = scale * (entry.difference or 0.0)
            if entry.ci_low is not None and entry.ci_high is not None:
                ends = [scale * entry.ci_low, scale * entry.ci_high]
                axes.plot(ends, [-y, -y], color=colour, linewidth=2, solid_capstyle="butt")
                values += ends
            face = PAPER if entry.unit == "seed" else colour
            size = 3.5 if entry.unit == "item" else 5.5
            axes.plot(difference, -y, "o", color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1.5)
            values.append(difference)
        y += 1.15
    room = 0.06 * (max(values) - min(values) or 1)
    low, high = min(values) - room, max(values) + room
    axes.axvspan(*((0, high) if description.higher_is_better else (low, 0)), color=GOOD, alpha=0.1, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set(xlim=(low, high), ylim=(0.6 - y, 0.7), yticks=[])
    axes.set_title(description.label + (", in points" if scale > 1 else ""), pad=5)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def changes(report: Report, candidate: str | None, grid: Grid) -> Picture | None:
    """How single items changed from the baseline to the candidate, a panel for each task."""
    shown = [entry for entry in report.changes if (entry.candidate, entry.grid) == (candidate, grid)][:_MOST_PANELS]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, (2.1 if columns == 2 else 3.0) * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, entry in zip(all_axes, shown, strict=False):
        _changes_panel(axes, entry, arm_colour(arm_slot(report, candidate) or 0))
    for axes in all_axes[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(f"value with {report.baseline}", fontsize=9, color=MUTED)
    figure.supylabel(f"change with {candidate}", fontsize=9, color=MUTED)
    counted = "; ".join(
        f"{entry.label}: {entry.better} of {entry.items} better, {entry.worse} worse" for entry in shown
    )
    drawn = max(len(entry.points) for entry in shown)
    sampled = f" ({drawn} of them are drawn)" if any(entry.items > len(entry.points) for entry in shown) else ""
    return Picture(
        "changes",
        f"How each item changed from {report.baseline} to {candidate}",
        f"Each dot is an item{sampled}; the shaded side is better. {counted}.",
        f"Change of each item against its value with {report.baseline}. {counted}.",
        inline_svg(figure, "changes"),
        [Key("an item", arm_key(report, str(candidate)).colour, mark="dot")],
    )


def _changes_panel(axes: Axes, entry: Change, colour: str) -> None:
    points = np.array(entry.points)
    change = points[:, 1] - points[:, 0]
    reach = 1.08 * float(np.abs(change).max()) or 1.0
    axes.axhspan(*((0, reach) if entry.higher_is_better else (-reach, 0)), color=GOOD, alpha=0.1, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.plot(points[:, 0], change, "o", color=colour, markersize=2.6, markeredgewidth=0, alpha=0.55)
    axes.set(ylim=(-reach, reach))
    axes.set_title(entry.metric.partition("/")[0], pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
