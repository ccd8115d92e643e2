"""The report's figures: loss curves, paired differences, ε per site, the learned shape, and sparsity."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from scipy.special import erf

from crrelu_llm.report import over_training, sparsity, text
from crrelu_llm.report.contents import find_arm, grids, runs
from crrelu_llm.report.differences import changes, forest
from crrelu_llm.report.drawing import Key, Picture, arm_key, line_style, new_axes
from crrelu_llm.report.schema import Arm, Grid, Report, Run, Values
from crrelu_llm.report.svg import INK, MUTED, PAPER, RULE, arm_colour, css_variable, drawing_style, inline_svg
from crrelu_llm.report.tables import arm_slot

_POINTS = 200  # per curve: more could not be distinguished at this size


def pictures(report: Report, candidate: str | None, grid: Grid) -> list[Picture]:
    """All figures that the report's numbers allow.

    Args:
        report: The report.
        candidate: The arm that the verdict is about, whose learned activation is drawn.
        grid: The grid value that the verdict is about, for the figures of ε and of zeros.
    """
    with drawing_style():
        found = [forest(report), changes(report, candidate, grid)]
        found += over_training.pictures(report)
        found += [*(_loss_curves(report, value, i) for i, value in enumerate(grids(report)))]
        found += [_epsilons(report, grid), _shape(report, candidate, grid), sparsity.picture(report, grid)]
    return [picture for picture in found if picture]


def _loss_curves(report: Report, grid: Grid, index: int) -> Picture | None:
    figure, axes = new_axes(3.2)
    drawn, lowest, highest = [], np.inf, -np.inf
    for arm in report.arms:
        steps, losses = _curves(runs(arm, grid))
        if not len(steps):
            continue
        mean, low, high = np.nanmean(losses, 0), np.nanmin(losses, 0), np.nanmax(losses, 0)
        style = line_style(report, arm.arm)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, **style)
        drawn.append(arm.arm)
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


def _curves(done: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps `(points,)` and losses `(runs, points)`, NaN where a run has none, thinned by averaging neighbours."""
    logs = [{entry["step"]: entry["loss"] for entry in run.history if entry.get("loss") is not None} for run in done]
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


def _epsilons(report: Report, grid: Grid) -> Picture | None:
    figure, axes = new_axes(3.0)
    drawn = []
    for arm in report.arms:
        done = runs(arm, grid)
        before, after = _by_site([run.epsilon_start for run in done]), _by_site([run.epsilon for run in done])
        if not any(any(values) for values in after.values()):
            continue
        style = line_style(report, arm.arm)
        x = np.arange(len(after))
        mean = [statistics.fmean(values) for values in after.values()]
        low, high = [min(values) for values in after.values()], [max(values) for values in after.values()]
        axes.vlines(x, low, high, color=style["color"], linewidth=1.2)
        axes.plot(x, mean, marker="o", markersize=4.5, **style)
        start = [statistics.fmean(before[path]) if before.get(path) else np.nan for path in after]
        axes.plot(x, start, "o", color=style["color"], markerfacecolor=PAPER, markersize=4.5, markeredgewidth=1.2)
        drawn.append(arm.arm)
    if not drawn:
        return None
    axes.set(xlabel="MLP site, in the model's order", ylabel="ε (mean of the site)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    keys = [arm_key(report, name) for name in drawn]
    if not any(run.epsilon_start for name in drawn for run in runs(find_arm(report, name), grid)):  # nothing trained
        words = ("ε of each site", "", f"ε by site for {', '.join(drawn)}.")
    else:
        keys += [Key("before training", "--muted", mark="ring"), Key("after", "--muted", mark="disc")]
        at = f" at {text.grid_label(grid)}" if grid else ""
        words = (
            "ε of each site before and after training",
            f"Mean over seeds{at}; the bar runs from the lowest to the highest seed.",
            f"ε by site, before and after training, for {', '.join(drawn)}.",
        )
    return Picture("epsilon", *words, inline_svg(figure, "epsilon"), keys)


def _by_site(seeds: list[Values]) -> dict[str, list[float]]:
    """The values of each site."""
    values: dict[str, list[float]] = {}
    for sites in seeds:
        for path, value in sites.items():
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


def _site_curves(arm: Arm | None, grid: Grid) -> dict[str, np.ndarray]:
    """The curves of the recorded sites, averaged over seeds."""
    found: dict[str, list[list[float]]] = {}
    for run in runs(arm, grid):
        for path, curve in run.curves.items():
            if None not in curve:
                found.setdefault(path, []).append([value or 0.0 for value in curve])
    return {path: np.mean(curves, axis=0) for path, curves in found.items()}


def _shape(report: Report, candidate: str | None, grid: Grid) -> Picture | None:
    arm = find_arm(report, candidate)
    curves = _site_curves(arm, grid)
    if arm is None or not curves or not arm.sites:  # the original of an evaluated checkpoint is unknown
        return None
    replaced = str(arm.sites[0].get("original"))
    original, formula = _ORIGINALS.get(replaced, _ORIGINALS["gelu"])
    figure, axes = new_axes(3.0)
    count = len(next(iter(curves.values())))
    x = np.linspace(-4, 3, count)
    axes.plot(x, formula(x), color=INK, linewidth=3.2, alpha=0.28)
    axes.plot(x, np.maximum(x, 0), color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    keys = [Key(original, "--ink", mark="thick"), Key("ReLU", "--muted", "2 2")]
    colour = arm_colour(arm_slot(report, candidate) or 0)
    dashes = ("", "5 1.8", "1.6 1.4")
    for (path, curve), dash in zip(curves.items(), dashes, strict=False):
        style: Any = (0, tuple(map(float, dash.split()))) if dash else "-"
        axes.plot(x, curve, color=colour, linestyle=style)
        keys.append(Key(path, css_variable(colour), dash))
    axes.set(xlabel="x", ylabel="f(x)", ylim=(-0.45, 1.6), xlim=(-4, 2))
    axes.axhline(0, color=RULE, linewidth=1)
    return Picture(
        "shape",
        f"The learned activation of {candidate}",
        "The functions that the first, a middle and the last site compute after calibration and training, averaged "
        f"over channels and seeds, beside ReLU and the original {original}.",
        f"Curves of the learned activation of {candidate} beside {original} and ReLU.",
        inline_svg(figure, "shape"),
        keys,
    )
