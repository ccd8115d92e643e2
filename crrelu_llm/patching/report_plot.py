"""Plots the effect of a patch on each layer."""

import re
from pathlib import Path
from typing import Any

from crrelu_llm.files import write_figure

PLOT = "patch_report.png"


def plot_report(report: dict[str, Any], path: str | Path) -> None:
    """Plots a patch report by layer: the error after a plain swap and after calibration, ε, scale, centre and width.

    Args:
        report: As in patch_report.json.
        path: The image file to write; the suffix sets the format (`.png`, `.svg`, `.pdf`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    sites = report["sites"]
    positions = _positions([site["path"] for site in sites])
    rows = [row for row in _rows(sites) if any(value is not None for _, values in row[1] for value in values)]
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "svg.hashsalt": "crrelu"}):
        figure = Figure(figsize=(7, 0.9 + 1.9 * max(1, len(rows))), layout="constrained")
        axes = figure.subplots(max(1, len(rows)), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, series) in zip(axes, rows, strict=False):
            for index, (name, values) in enumerate(series):
                known = [(x, y) for x, y in zip(positions, values, strict=True) if y is not None]
                colour = ("#c4472b", "#1f6f8b")[-index - 1]
                axis.plot(*zip(*known, strict=True), "os"[index], ms=4, color=colour, label=name)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if len(series) > 1:
                axis.legend(frameon=False, fontsize=8)
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[-1].set_xlabel("layer")
        figure.suptitle(_title(report), fontsize=9.5)
        write_figure(Path(path), figure, dpi=150)


def _rows(sites: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, list[Any]]]]]:
    errors = [
        ("after the plain swap", [site.get("relative_error_naive") for site in sites]),
        ("after calibration", [site["relative_error"] for site in sites]),
    ]
    return [
        ("relative error\nof the MLP", errors),
        ("mean ε", [("", [site["epsilon_mean"] for site in sites])]),
        ("mean scale", [("", [site["scale_mean"] for site in sites])]),
        ("center", [("", [site.get("center") for site in sites])]),
        ("width", [("", [site.get("width") for site in sites])]),
    ]


def _positions(paths: list[str]) -> list[float]:
    """The layer of each site; several sites of a layer are drawn side by side."""
    layers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", path)) else 0 for path in paths]
    counts = {layer: layers.count(layer) for layer in layers}
    seen: dict[int, int] = {}
    positions = []
    for layer in layers:
        seen[layer] = seen.get(layer, 0) + 1
        positions.append(layer + 0.7 * (seen[layer] - 1) / counts[layer])
    return positions


def _title(report: dict[str, Any]) -> str:
    options = report["options"] or {}
    title = f"{Path(report['model']).name} → {report['activation']}, calibration {options.get('calibration')}"
    found = report["perplexity"]
    if found:
        naive = "" if found["after_naive"] is None else f", {found['after_naive']:,.2f} after a plain swap"
        title += f"\nperplexity {found['before']:,.2f} before{naive}, {found['after']:,.2f} after"
    return title
