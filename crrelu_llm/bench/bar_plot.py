"""Plots a benchmark: bandwidth relative to a copy (`op`), or time and memory relative to GELU (the others)."""

from itertools import groupby
from pathlib import Path
from typing import Any

from crrelu_llm.files import write_figure

PLOT = "bench.png"
_OURS, _OTHERS, _COPY = "#1f6f8b", "#b8b8b8", "#c4472b"


def plot(document: dict[str, Any], path: str | Path) -> None:
    """Draws the cases of a benchmark as horizontal bars, one panel per shape and dtype.

    Args:
        document: As in bench.json.
        path: The image file to write; the suffix sets the format (`.png`, `.svg`, `.pdf`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    bandwidth = document["cases"][0]["gigabytes_per_second"] is not None
    rows = _panels(document["cases"], bandwidth)
    height = sum(max(len(cases) for _, cases in row) for row in rows)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8, "svg.hashsalt": "crrelu"}):
        columns = max(map(len, rows)) if bandwidth else 2
        figure = Figure(figsize=(1 + 3.6 * columns, 0.6 + 0.55 * len(rows) + 0.19 * height), layout="constrained")
        ratios = [max(len(cases) for _, cases in row) + 1 for row in rows]
        axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=ratios)
        for line, row in zip(axes, rows, strict=True):
            if bandwidth:
                for axis, (title, cases) in zip(line, row, strict=False):
                    _bandwidth(axis, title, cases)
            else:
                _against_gelu(line, *row[0])
            for axis in line[len(row) if bandwidth else 2 :]:
                axis.set_visible(False)
        figure.suptitle(_title(document), fontsize=9)
        write_figure(Path(path), figure, dpi=130)


def _panels(cases: list[dict[str, Any]], bandwidth: bool) -> list[list[tuple[str, list[dict[str, Any]]]]]:
    """Rows of panels, each a title and its cases: one row per shape, dtype and kind; for `op`, one panel per
    direction."""
    rows = []
    for _, group in groupby(cases, lambda entry: (entry["kind"], entry["dtype"], tuple(entry["shape"]))):
        found = list(group)
        title = f"{'×'.join(map(str, found[0]['shape']))} {found[0]['dtype']}, {found[0]['kind']}"
        if not bandwidth:
            rows.append([(title, found)])
            continue
        directions = list(dict.fromkeys(entry["direction"] for entry in found))
        row = []
        for direction in directions:
            chosen = [entry for entry in found if entry["direction"] == direction and entry["name"] != "copy"]
            row.append((f"{title}, {direction}", chosen))
        rows.append(row)
    return rows


def _bars(axis: Any, title: str, cases: list[dict[str, Any]], values: list[float], texts: list[str]) -> None:
    colours = [_OURS if entry["name"].startswith("crrelu") else _OTHERS for entry in cases]
    axis.barh(range(len(cases)), values, color=colours, height=0.75)
    labels = [entry["name"] if entry["backend"] == "torch" else _name(entry) for entry in cases]
    axis.set_yticks(range(len(cases)), labels)
    axis.invert_yaxis()
    for index, (value, text) in enumerate(zip(values, texts, strict=True)):
        shadow = {
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.8,
            "pad": 0.4,
        }  # text stays readable on the line
        axis.text(value, index, f" {text}", va="center", fontsize=6.5, bbox=shadow)
    axis.set_title(title, fontsize=8)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _name(entry: dict[str, Any]) -> str:
    return entry["name"] if entry["backend"] == "auto" else f"{entry['name']}, {entry['backend']}"


def _bandwidth(axis: Any, title: str, cases: list[dict[str, Any]]) -> None:
    texts = [f"{entry['fraction_of_copy_bandwidth']:.0%}, {entry['ratio_to_gelu']:.2f}×" for entry in cases]
    _bars(axis, title, cases, [entry["gigabytes_per_second"] for entry in cases], texts)
    axis.axvline(cases[0]["copy_gigabytes_per_second"], color=_COPY, lw=1)
    axis.set_xlim(0, 1.3 * max(*axis.get_xlim(), cases[0]["copy_gigabytes_per_second"]))
    axis.set_xlabel("GB/s (line: a copy; share of a copy, time relative to gelu)", fontsize=7)


def _against_gelu(axes: Any, title: str, cases: list[dict[str, Any]]) -> None:
    gelu = next(entry for entry in cases if entry["name"] == "gelu")
    times = [f"{entry['milliseconds']:.3g} ms" for entry in cases]
    memory = [entry["peak_memory_bytes"] for entry in cases]
    texts = [f"{size / 2**20:,.1f} MiB" for size in memory]
    _bars(axes[0], title, cases, [entry["ratio_to_gelu"] for entry in cases], times)
    _bars(axes[1], title, cases, [size / gelu["peak_memory_bytes"] for size in memory], texts)
    for axis, label in zip(axes, ("time, relative to gelu", "peak memory, relative to gelu"), strict=True):
        axis.axvline(1, color=_COPY, lw=1)
        axis.set_xlabel(label, fontsize=7)


def _title(document: dict[str, Any]) -> str:
    about = document["environment"]
    where = about["processor"] if document["device"] == "cpu" else document["device"]
    torch = about["versions"].get("torch")
    return f"crrelu bench {document['bench']}: {where}, {about['threads']} threads, torch {torch}"
