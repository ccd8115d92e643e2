"""The text that `crrelu bench` prints: one table for each kind, dtype, shape and direction."""

from itertools import groupby
from typing import Any

from crrelu_llm.columns import aligned


def text(document: dict[str, Any]) -> str:
    """Tables of a document as in bench.json."""
    environment = document["environment"]
    lines = [f"{document['device']}, {environment['processor']}, {environment['threads']} threads"]
    for about, cases in groupby(document["cases"], lambda entry: tuple(map(str, map(entry.get, _GROUP)))):
        kind, dtype = about[:2]
        rows = list(cases)
        lines += [
            "",
            f"{kind}, {dtype}, {'x'.join(map(str, rows[0]['shape']))}",
            *aligned([_header(rows), *_rows(rows)], _SIDES, "  "),
        ]
    if document.get("errors"):
        lines += ["", *_errors(document["errors"])]
    left_out = [f"left out: {_label(entry)}: {entry['reason']}" for entry in document["left_out"]]
    return "\n".join([*lines, *([""] if left_out else []), *left_out])


_GROUP = ("kind", "dtype", "shape")
_SIDES = "<<<>"  # three columns of words, then numbers


def _label(entry: dict[str, Any]) -> str:
    return ", ".join(entry[key] for key in ("name", "backend", "direction") if entry.get(key))


def _header(rows: list[dict[str, Any]]) -> list[str]:
    speed = ["tokens/s"] if "tokens_per_second" in rows[0] else []
    bandwidth = ["GB/s", "of copy"] if rows[0]["gigabytes_per_second"] is not None else []
    return ["name", "backend", "direction", "ms", "quartiles", "of gelu's", *speed, *bandwidth, "peak MiB"]


def _rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = []
    for row in rows:
        line = [row["name"], row["backend"], row["direction"], _short(row["milliseconds"])]
        line += [
            f"{_short(row['milliseconds_low'])}-{_short(row['milliseconds_high'])}",
            f"{row['ratio_to_gelu']:.2f}",
        ]
        if "tokens_per_second" in row:
            line.append(f"{row['tokens_per_second']:.0f}")
        if row["gigabytes_per_second"] is not None:
            line += [f"{row['gigabytes_per_second']:.1f}", f"{row['fraction_of_copy_bandwidth']:.0%}"]
        cells.append([*line, f"{row['peak_memory_bytes'] / 2**20:.1f}"])
    return cells


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    keys = ("value_max", "value_mean", "gradient_max", "gradient_mean", "epsilon_gradient")
    header = ["name", "backend", "dtype", *(key.replace("_", " ") for key in keys)]
    cells = [
        [row["name"], row["backend"], row["dtype"], *("" if row[key] is None else f"{row[key]:.1e}" for key in keys)]
        for row in rows
    ]
    return [
        "absolute errors against float64 (epsilon gradient: relative)",
        *aligned([header, *cells], _SIDES, "  "),
    ]


def _short(milliseconds: float) -> str:
    """Formats a number with three digits, or more only before the decimal point."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"
