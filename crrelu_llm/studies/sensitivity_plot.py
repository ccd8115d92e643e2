"""Plots the ε study: the loss against the start value, the final ε, and the functions themselves."""

from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.files import write_figure
from crrelu_llm.studies.sensitivity import FROZEN, LEARNED_CHANNEL, LEARNED_LAYER, WAYS

PLOT = "epsilon.png"
_LOWEST = 0.15  # nats: the range of the zoomed panel, which leaves out start values with a much higher loss
_COLOURS = {FROZEN: "#7a7a7a", LEARNED_LAYER: "#1f6f8b", LEARNED_CHANNEL: "#c4472b"}
_MARKS = {FROZEN: "s", LEARNED_LAYER: "o", LEARNED_CHANNEL: "D"}
_LABELS = {FROZEN: "frozen (per layer and per channel are the same)"}


def plot(document: dict[str, Any], path: str | Path) -> None:
    """Plots a study: the losses, a zoom on the lowest losses, the final ε, and the functions.

    Args:
        document: As in epsilon.json.
        path: The image file to write; the suffix sets the format (`.png`, `.svg`, `.pdf`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8.5, "svg.hashsalt": "crrelu"}):
        figure = Figure(figsize=(7, 11), layout="constrained")
        losses, lowest, ends, shapes = figure.subplots(4, 1, height_ratios=(3, 2.4, 2, 2.2))
        _losses(losses, document)
        losses.legend(frameon=False, fontsize=7.5)
        _losses(lowest, document)
        _zoom(lowest, document)
        _ends(ends, document)
        _shapes(shapes, document)
        values = [entry["epsilon"] for entry in document["shapes"]]
        for axis in (losses, lowest, ends):
            _start_values(axis, values)
        for axis in (lowest, ends):
            axis.set_xlim(losses.get_xlim())
        for axis in (losses, lowest, ends, shapes):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        write_figure(Path(path), figure, dpi=130)


def _losses(axis: Any, document: dict[str, Any]) -> None:
    before = {case["epsilon_init"]: case["before"] for case in document["cases"] if case["before"] is not None}
    points = sorted(before.items())
    axis.plot([x for x, _ in points], [y for _, y in points], "--o", mfc="none", color="black", lw=1, ms=4,
              label="before training")  # fmt: skip
    for way in WAYS:
        cases = [case for case in document["cases"] if case["way"] == way]
        done = [case for case in cases if case["after"] is not None]
        x, y, low, high = (
            np.array([case[key] for case in done], dtype=float)
            for key in ("epsilon_init", "after", "after_low", "after_high")
        )
        style: dict[str, Any] = {"marker": _MARKS[way], "ms": 4, "color": _COLOURS[way]}
        if done:
            axis.errorbar(x, y, [y - low, high - y], lw=1.3, **style, label=_LABELS.get(way, way))
        failed = [case["epsilon_init"] for case in cases if case["failed"]]
        if failed:  # at the upper edge, because they have no loss
            place = {"transform": axis.get_xaxis_transform(), "clip_on": False}
            style |= {"marker": "x", "ms": 8, "mew": 2, "ls": "none", "label": f"failed runs, {way}"}
            axis.plot(failed, [1.0] * len(failed), **style, **place)
    for key, dash in (("before", "--"), ("after", "-")):
        if document["native"][key] is not None:
            axis.axhline(document["native"][key], color="#3f8f4f", lw=1, ls=dash, label=f"native, {key} training")
    axis.set(xlabel="ε at the start", ylabel="loss on held-out text, nats per token")


def _zoom(axis: Any, document: dict[str, Any]) -> None:
    losses = [case["after"] for case in document["cases"]] + [document["native"]["after"]]
    known = [loss for loss in losses if loss is not None]
    if known:
        axis.set_ylim(min(known) - 0.1 * _LOWEST, min(known) + _LOWEST)
    axis.set_title(f"the same, the lowest {_LOWEST} nats", fontsize=7.5, loc="left")


def _ends(axis: Any, document: dict[str, Any]) -> None:
    for way in (LEARNED_LAYER, LEARNED_CHANNEL):
        cases = [case for case in document["cases"] if case["way"] == way and case["epsilon_end"] is not None]
        if not cases:
            continue
        x = [case["epsilon_init"] for case in cases]
        moved, low, high = (
            np.array([case[key] - case["epsilon_init"] for case in cases])
            for key in ("epsilon_end", "epsilon_low", "epsilon_high")
        )
        axis.errorbar(x, moved, [moved - low, high - moved], marker=_MARKS[way], ms=4, lw=1.3, capsize=2,
                      color=_COLOURS[way], label=way)  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xlabel="ε at the start", ylabel="ε at the end − at the start")
    axis.set_title("mean over sites; the bar runs from the lowest to the highest site", fontsize=7.5, loc="left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7.5)


def _shapes(axis: Any, document: dict[str, Any]) -> None:
    from matplotlib import colormaps

    x = np.linspace(-4, 2.5, 400)
    values = [entry["epsilon"] for entry in document["shapes"]]
    for index, value in enumerate(values):
        colour = colormaps["viridis"](0.9 * index / max(1, len(values) - 1))
        axis.plot(x, np.maximum(x, 0) + value * x * np.exp(-(x**2) / 2), lw=1.2, color=colour, label=f"ε = {value:g}")
    axis.set(xlabel="x", ylabel="max(0, x) + ε·x·exp(−x²/2)")
    axis.legend(frameon=False, fontsize=7, ncols=2)


def _start_values(axis: Any, values: list[float]) -> None:
    """An axis that separates start values of different orders of magnitude."""
    sizes = [abs(value) for value in values if value]
    if sizes and max(sizes) > 20 * min(sizes):
        axis.set_xscale("symlog", linthresh=min(sizes))
        axis.margins(x=0.04)
    axis.set_xticks(values, [f"{value:g}" for value in values], fontsize=7.5)
    axis.set_xticks([], minor=True)
