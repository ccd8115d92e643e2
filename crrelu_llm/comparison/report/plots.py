"""The report's figures: loss curves, paired differences, ε per site, and the learned shape."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from scipy.special import erf

from crrelu_llm.comparison.report import text
from crrelu_llm.comparison.report.contents import (
    Grid,
    Report,
    describe,
    find_arm,
    grids,
    items_word,
    paired_over,
    runs,
)
from crrelu_llm.comparison.report.svg import (
    GOOD,
    INK,
    MUTED,
    PAPER,
    RULE,
    arm_colour,
    css_variable,
    drawing_style,
    inline_svg,
)
from crrelu_llm.comparison.report.tables import arm_slot

_WIDTH = 5.0  # inches: small enough that the letters stay readable when a telephone shrinks it
_DASHES = ("", "5 1.8", "1.6 1.4", "6 1.8 1.6 1.8", "9 2.5", "3 1.2", "8 1.6 1.6 1.6 1.6 1.6", "2.6 2.6")
_POINTS = 200  # of a curve: more cannot be told apart at this size
_LONGEST_FOREST = 40


@dataclass
class Key:
    """One entry of a legend: a line (with its dash, in line widths) or a mark, in a colour of the page."""

    label: str
    colour: str
    dash: str = ""
    mark: str = "line"


@dataclass
class Picture:
    """A figure of the report: the SVG, a title, a caption, what it shows in words, and the legend."""

    name: str
    title: str
    caption: str
    description: str
    svg: str
    keys: list[Key] = field(default_factory=list)


def pictures(report: Report, candidate: str | None, grid: Grid) -> list[Picture]:
    """All figures that the report's numbers allow.

    Args:
        report: The report.
        candidate: The arm that the verdict speaks of: its shape is drawn.
        grid: The grid value that the verdict speaks of: ε is shown at it.
    """
    with drawing_style():
        found = [_forest(report), *(_loss_curves(report, value, i) for i, value in enumerate(grids(report)))]
        found += [_epsilons(report, grid), _shape(report, candidate, grid)]
    return [picture for picture in found if picture]


def arm_key(report: Report, name: str) -> Key:
    """The legend entry of an arm: the same colour and dash everywhere."""
    slot = arm_slot(report, name) or 0
    return Key(name, css_variable(arm_colour(slot)), _DASHES[slot % len(_DASHES)])


def _line(report: Report, name: str) -> dict[str, Any]:
    slot = arm_slot(report, name) or 0
    dash = _DASHES[slot % len(_DASHES)]
    return {"color": arm_colour(slot), "linestyle": (0, tuple(map(float, dash.split()))) if dash else "-"}


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _loss_curves(report: Report, grid: Grid, index: int) -> Picture | None:
    figure, axes = _axes(3.2)
    drawn, lowest, highest = [], np.inf, -np.inf
    for arm in report.get("arms", []):
        steps, losses = _curves(runs(arm, grid))
        if not len(steps):
            continue
        mean, low, high = np.nanmean(losses, 0), np.nanmin(losses, 0), np.nanmax(losses, 0)
        style = _line(report, arm["arm"])
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, **style)
        drawn.append(arm["arm"])
        lowest, highest = min(lowest, low.min()), max(highest, high.max())
    if not drawn:
        return None
    if lowest > 0 and highest / lowest > 1.8:
        _log_scale(axes, highest / lowest)
    axes.set(xlabel="step", ylabel="training loss")
    axes.margins(x=0.01)
    label = f" ({text.grid_label(grid)})" if grid else ""
    return Picture(
        f"loss{index}",
        f"Training loss{label}",
        "Mean over seeds; the band runs from the lowest to the highest seed.",
        f"Training loss by step{label} for {', '.join(drawn)}.",
        inline_svg(figure, f"loss{index}"),
        [arm_key(report, name) for name in drawn],
    )


def _curves(done: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps `(points,)` and losses `(runs, points)`, NaN where a run has none, thinned by averaging neighbours."""
    logs = [
        {entry["step"]: entry["loss"] for entry in run.get("history") or [] if entry.get("loss") is not None}
        for run in done
    ]
    steps = np.array(sorted({step for log in logs for step in log}), dtype=float)
    logs = [log for log in logs if log]
    losses = np.array([[log.get(step, np.nan) for step in steps] for log in logs])
    width = -(-len(steps) // _POINTS) if len(steps) else 1
    if width == 1:
        return steps, losses
    bins = np.array_split(np.arange(len(steps)), -(-len(steps) // width))
    thinned = np.full((len(logs), len(bins)), np.nan)
    for i, members in enumerate(bins):
        for j, values in enumerate(losses[:, members]):
            if np.isfinite(values).any():
                thinned[j, i] = np.nanmean(values)
    return np.array([steps[members].mean() for members in bins]), thinned


def _log_scale(axes: Axes, ratio: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio > 12 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _forest(report: Report) -> Picture | None:
    panels: dict[str, list[dict[str, Any]]] = {}
    for entry in report.get("comparisons", []):
        if entry.get("difference") is not None and not describe(report, entry["metric"])["reference"]:
            panels.setdefault(entry["metric"], []).append(entry)
    headline = (report.get("headline") or {}).get("metric")
    order = sorted(panels, key=lambda metric: metric != headline)
    if sum(map(len, panels.values())) > _LONGEST_FOREST:
        order = order[:1]
    if not order:
        return None
    heights = [0.75 + 0.17 * _forest_lines(panels[metric]) for metric in order]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(order), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric in zip(all_axes, order, strict=True):
        _forest_panel(axes, report, metric, panels[metric])
    shown = [entry for metric in order for entry in panels[metric]]
    units = {entry["unit"] for entry in shown}
    marks = {
        "both": Key(f"over {items_word(report)} and seeds", "--muted", mark="disc"),
        "item": Key(f"over {items_word(report)}", "--muted", mark="dot"),
        "seed": Key("over seeds", "--muted", mark="ring"),
    }
    confidence = f"{shown[0]['confidence']:.0%}"
    return Picture(
        "forest",
        f"Paired difference from {report.get('baseline')}",
        f"Candidate minus baseline with the {confidence} interval; the shaded side is better.",
        "; ".join(
            f"{describe(report, entry['metric'])['label']} of {entry['candidate']} over {paired_over(report, entry)}: "
            f"{text.signed(entry['difference'], describe(report, entry['metric'])['format'])}"
            for entry in shown
        ),
        inline_svg(figure, "forest"),
        [marks[unit] for unit in marks if unit in units],
    )


def _forest_groups(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: entry["unit"]):
        grid = text.grid_label(entry.get("grid") or {})
        groups.setdefault(entry["candidate"] + (f", {grid}" if grid else ""), []).append(entry)
    return groups


def _forest_lines(entries: list[dict[str, Any]]) -> float:
    return sum(1.15 + len(group) for group in _forest_groups(entries).values())


def _forest_panel(axes: Axes, report: Report, metric: str, entries: list[dict[str, Any]]) -> None:
    description = describe(report, metric)
    scale = 100.0 if description["format"].endswith("%}") else 1.0
    y, values = 0.0, [0.0]
    for label, group in _forest_groups(entries).items():
        clear = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1}
        place = axes.get_yaxis_transform()
        axes.text(0.0, -y, label, transform=place, va="center", fontsize=8.5, zorder=5, bbox=clear)
        for entry in group:
            y += 1
            colour = arm_colour(arm_slot(report, entry["candidate"]) or 0)
            difference = scale * entry["difference"]
            if entry["ci_low"] is not None and entry["ci_high"] is not None:
                ends = [scale * entry["ci_low"], scale * entry["ci_high"]]
                axes.plot(ends, [-y, -y], color=colour, linewidth=2, solid_capstyle="butt")
                values += ends
            face = PAPER if entry["unit"] == "seed" else colour
            size = 3.5 if entry["unit"] == "item" else 5.5
            axes.plot(difference, -y, "o", color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1.5)
            values.append(difference)
        y += 1.15
    room = 0.06 * (max(values) - min(values) or 1)
    low, high = min(values) - room, max(values) + room
    axes.axvspan(*((0, high) if description["higher_is_better"] else (low, 0)), color=GOOD, alpha=0.1, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set(xlim=(low, high), ylim=(0.6 - y, 0.7), yticks=[])
    axes.set_title(description["label"] + (", in points" if scale > 1 else ""), pad=5)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _epsilons(report: Report, grid: Grid) -> Picture | None:
    figure, axes = _axes(3.0)
    drawn = []
    for arm in report.get("arms", []):
        before, after = (_site_values(arm, grid, key) for key in ("epsilon_start", "epsilon"))
        if not any(any(values) for values in after.values()):
            continue
        style = _line(report, arm["arm"])
        x = np.arange(len(after))
        mean = [statistics.fmean(values) for values in after.values()]
        low, high = [min(values) for values in after.values()], [max(values) for values in after.values()]
        axes.vlines(x, low, high, color=style["color"], linewidth=1.2)
        axes.plot(x, mean, marker="o", markersize=4.5, **style)
        start = [statistics.fmean(before[path]) if before.get(path) else np.nan for path in after]
        axes.plot(x, start, "o", color=style["color"], markerfacecolor=PAPER, markersize=4.5, markeredgewidth=1.2)
        drawn.append(arm["arm"])
    if not drawn:
        return None
    axes.set(xlabel="MLP site, in the model's order", ylabel="ε (mean of the site)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    marks = [Key("before training", "--muted", mark="ring"), Key("after", "--muted", mark="disc")]
    at = f" at {text.grid_label(grid)}" if grid else ""
    return Picture(
        "epsilon",
        "ε of each site before and after training",
        f"Mean over seeds{at}; the bar runs from the lowest to the highest seed.",
        f"ε by site, before and after training, for {', '.join(drawn)}.",
        inline_svg(figure, "epsilon"),
        [*(arm_key(report, name) for name in drawn), *marks],
    )


def _site_values(arm: dict[str, Any], grid: Grid, key: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for run in runs(arm, grid):
        for path, value in (run.get(key) or {}).items():
            if value is not None:
                values.setdefault(path, []).append(value)
    return values


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_ORIGINALS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "gelu": ("GELU", _gelu),
    "gelu_new": ("GELU (tanh form)", _gelu_tanh),
    "gelu_fast": ("GELU (tanh form)", _gelu_tanh),
    "gelu_pytorch_tanh": ("GELU (tanh form)", _gelu_tanh),
    "silu": ("SiLU", lambda x: x / (1 + np.exp(-x))),
    "swish": ("SiLU", lambda x: x / (1 + np.exp(-x))),
}


def _shape(report: Report, candidate: str | None, grid: Grid) -> Picture | None:
    arm = find_arm(report, candidate)
    epsilons = _site_values(arm, grid, "epsilon") if arm else {}
    if arm is None or not any(any(values) for values in epsilons.values()):
        return None
    sites = {site.get("path"): site for site in (arm.get("patch") or {}).get("sites") or []}
    replaced = next((str(site.get("original")) for site in sites.values()), "gelu")
    original, formula = _ORIGINALS.get(replaced, _ORIGINALS["gelu"])
    figure, axes = _axes(3.0)
    x = np.linspace(-4, 3, 281)
    axes.plot(x, formula(x), color=INK, linewidth=3.2, alpha=0.28)
    axes.plot(x, np.maximum(x, 0), color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    keys = [Key(original, "--ink", mark="thick"), Key("ReLU", "--muted", "2 2")]
    paths = list(epsilons)
    colour = arm_colour(arm_slot(report, candidate) or 0)
    dashes = ("", "5 1.8", "1.6 1.4")
    for path, dash in zip(dict.fromkeys((paths[0], paths[len(paths) // 2], paths[-1])), dashes, strict=False):
        epsilon = statistics.fmean(epsilons[path])
        scale = sites.get(path, {}).get("scale_mean") or 1.0
        bump = epsilon * x * np.exp(-((scale * x) ** 2) / 2)
        style: Any = (0, tuple(map(float, dash.split()))) if dash else "-"
        axes.plot(x, np.maximum(x, 0) + bump, color=colour, linestyle=style)
        keys.append(Key(f"{path}, ε = {text.number(epsilon, '{:.3f}')}", css_variable(colour), dash))
    axes.set(xlabel="x", ylabel="f(x)", ylim=(-0.45, 1.6), xlim=(-4, 2))
    axes.axhline(0, color=RULE, linewidth=1)
    return Picture(
        "shape",
        f"The learned activation of {candidate}",
        "max(0, x) + ε·x·exp(−x²/2) with ε of the first, a middle and the last site, drawn at the scale that was "
        f"folded into the weights, beside the {original} it replaced and ReLU.",
        f"Curves of the learned activation of {candidate} beside {original} and ReLU.",
        inline_svg(figure, "shape"),
        keys,
    )
