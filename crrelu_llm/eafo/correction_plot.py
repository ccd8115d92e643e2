"""Plots a correction: activation, derivative, correction, density, and entropy along ε."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.eafo.correction import Correction, corrected
from crrelu_llm.eafo.entropy import of_output
from crrelu_llm.errors import InputError
from crrelu_llm.files import write_figure

_SHADE, _LINE = "#e8e2d8", "#1f6f8b"


def plot(correction: Correction, values: Sequence[float], path: Path) -> None:
    """Draws five panels.

    Args:
        correction: From `correct`.
        values: Factors ε for which to draw f + ε·c; if c has a pole, only f is drawn.
        path: The image file; the suffix sets the format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8, "svg.hashsalt": "crrelu"}):
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots(2, 3).ravel()
        _curves(axes[0], axes[1], correction, values)
        _correction(axes[2], correction)
        _density(axes[3], correction)
        _entropy(axes[4], correction, values)
        _legend(axes[5], axes[0])
        figure.suptitle(f"{correction.activation.name} × {correction.density.name}", fontsize=10)
        write_figure(path, figure, dpi=130)


def _line(correction: Correction) -> Any:
    center = correction.density.center
    reach = 4 * min(correction.density.spread, 10)
    return np.linspace(min(center - reach, -1), max(center + reach, 1), 1601)


def _curves(upper: Any, lower: Any, correction: Correction, values: Sequence[float]) -> None:
    import matplotlib

    t, activation = _line(correction), correction.activation
    try:
        moved = [corrected(correction, value) for value in values]
    except InputError as pole:
        moved = []
        upper.set_xlabel(str(pole).partition(";")[0], fontsize=6, wrap=True)
    colours = matplotlib.colormaps["coolwarm"](np.linspace(0, 1, max(len(moved), 2)))
    for one, colour in zip(moved, colours, strict=False):
        upper.plot(t, one.value(t), color=colour, lw=1, label=f"f + ε·c, ε = {one.epsilon:g}")
        lower.plot(t, _gaps(one.derivative(t)), color=colour, lw=1)
    upper.plot(t, activation.value(t), color="black", lw=1.3, label=f"f = {activation.name}")
    lower.plot(t, activation.derivative(t), color="black", lw=1.3)
    upper.set_title("activation")
    lower.set_title("derivative")


def _gaps(values: Any) -> Any:
    """Removes the spikes of finite differences across a jump."""
    return np.where(np.abs(values) > 50, np.nan, values)


def _correction(axis: Any, correction: Correction) -> None:
    t = _line(correction)
    values = correction.forward(t)
    inside = values[correction.applies(t) & np.isfinite(values)]
    reach = 1.3 * float(np.abs(inside).max()) if inside.size else 1.0
    axis.plot(t, np.where(np.abs(values) > 3 * reach, np.nan, values), color=_LINE)
    axis.plot(t, correction.density.derivative(t), color="black", lw=0.7, ls=":", label="p′")
    for entry in correction.excluded:
        if entry.low < entry.high:
            axis.axvspan(max(entry.low, t[0]), min(entry.high, t[-1]), color=_SHADE, zorder=0)
    axis.axhline(0, color="grey", lw=0.5)
    axis.set_ylim(-reach, reach)
    axis.set_xlim(t[0], t[-1])
    axis.legend(frameon=False)
    axis.set_title("correction c = p′ − p·f″/f′ (shaded: does not apply)")


def _density(axis: Any, correction: Correction) -> None:
    t = _line(correction)
    axis.fill_between(t, correction.density.pdf(t), color=_LINE, alpha=0.4)
    axis.set_title("density of the pre-activations")


def _entropy(axis: Any, correction: Correction, values: Sequence[float]) -> None:
    """Plots the two scale-free entropies: at a finite resolution and, where it is finite, at unit variance."""
    reach = max(np.abs(values).max() if len(values) else 1.0, 1e-3)
    steps = np.linspace(-reach, reach, 11)
    axis.set_title("entropy of the output along ε, at unit variance")
    axis.set_ylabel("nats")
    axis.set_xlabel("ε")
    try:
        found = [of_output(corrected(correction, step), correction.density) for step in steps]
    except InputError as pole:
        axis.text(
            0.5, 0.5, str(pole).replace(", where", ",\nwhere"), transform=axis.transAxes, ha="center", fontsize=7
        )
        return
    axis.plot(steps, [one.at_resolution for one in found], color="black", label="rounded to 1/20 of a deviation")
    smooth = [one.standardised for one in found]
    if np.isfinite(smooth).any():
        axis.plot(steps, np.where(np.isfinite(smooth), smooth, np.nan), color=_LINE, label="differential")
    axis.legend(frameon=False)


def _legend(axis: Any, curves: Any) -> None:
    axis.axis("off")
    axis.legend(*curves.get_legend_handles_labels(), frameon=False, loc="center")
