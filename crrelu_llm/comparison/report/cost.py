"""What each arm costs: time and memory, and how they relate to the baseline's."""

import statistics
from typing import Any

from crrelu_llm.comparison.report import text
from crrelu_llm.comparison.report.contents import Report, find_arm, grids, runs
from crrelu_llm.comparison.report.tables import Cell, Table


def of_training(report: Report) -> Table:
    """Arms (and grid values) by the time of the patch and of training, and peak memory; no rows where no run has
    finished."""
    gridded = grids(report) != [{}]
    columns = ["arm", *(["grid"] if gridded else []), "patch and calibration"]
    columns += ["training time", "ratio", "tokens/s", "ratio", "peak memory", "ratio"]
    table = Table(columns, words=2 if gridded else 1)
    base = find_arm(report, report.get("baseline")) or {}
    for grid in grids(report):
        ours = _training(runs(base, grid))
        for arm in report.get("arms", []):
            if not runs(arm, grid):
                continue
            row = [Cell(arm["arm"], arm=arm["arm"]), *([Cell(text.grid_label(grid))] if gridded else [])]
            row.append(Cell(text.duration((arm.get("patch") or {}).get("seconds"))))
            spelled = (text.duration, lambda value: text.number(value, "{:,.0f}"), text.memory)
            for value, reference, spell in zip(_training(runs(arm, grid)), ours, spelled, strict=True):
                row += [Cell(spell(value)), Cell(_ratio(value, reference))]
            table.rows.append(row)
    return table


def of_evaluation(report: Report) -> Table:
    """Models by the time of all tasks, and peak memory."""
    table = Table(["model", "parameters", "items", "time of the evaluation", "ratio", "peak memory", "ratio"])
    base = find_arm(report, report.get("baseline"))
    ours = _evaluation(base) if base else (None, None, None)
    for arm in report.get("arms", []):
        items, seconds, memory = _evaluation(arm)
        parameters = arm.get("parameters")
        row = [Cell(arm["arm"], arm=arm["arm"]), Cell(f"{parameters:,}" if parameters else text.MISSING)]
        row += [Cell(f"{items:,}" if items else text.MISSING)]
        # Times of different sets of tasks cannot be compared.
        row += [Cell(text.duration(seconds)), Cell(_ratio(seconds, ours[1]) if items == ours[0] else text.MISSING)]
        row += [Cell(text.memory(memory)), Cell(_ratio(memory, ours[2]))]
        if items:
            table.rows.append(row)
    return table


def _training(done: list[dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """Mean seconds of training, mean tokens per second, and the largest peak of memory, of the finished runs."""
    columns = [
        [run[key] for run in done if run.get(key) is not None]
        for key in ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    ]
    seconds, speed = (statistics.fmean(column) if column else None for column in columns[:2])
    return seconds, speed, max(columns[2], default=None)


def _evaluation(arm: dict[str, Any]) -> tuple[int | None, float | None, float | None]:
    """Number of items, seconds, and peak memory."""
    run = arm["runs"][0]
    return (
        sum((run.get("items") or {}).values()) or None,
        sum((run.get("seconds") or {}).values()) or None,
        run.get("peak_memory_bytes"),
    )


def _ratio(value: float | None, reference: float | None) -> str:
    return text.MISSING if value is None or not reference else f"{value / reference:.2f}"
