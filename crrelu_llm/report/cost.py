"""The cost of each arm: time and memory, and their ratio to the baseline."""

from crrelu_llm.report import text
from crrelu_llm.report.contents import find_arm, grids, of_runs, runs
from crrelu_llm.report.schema import Arm, Report
from crrelu_llm.report.tables import Cell, Table


def of_training(report: Report) -> Table:
    """A row for each arm (and grid value) with a finished run: patch time, training time, speed and peak memory."""
    gridded = grids(report) != [{}]
    columns = ["arm", *(["grid"] if gridded else []), "patch and calibration"]
    columns += ["training time", "ratio", "tokens/s", "ratio", "peak memory", "ratio"]
    table = Table(columns, words=2 if gridded else 1)
    base = find_arm(report, report.baseline)
    for grid in grids(report):
        ours = of_runs(runs(base, grid))
        for arm in report.arms:
            if not runs(arm, grid):
                continue
            row = [Cell(arm.arm, arm=arm.arm), *([Cell(text.grid_label(grid))] if gridded else [])]
            row.append(Cell(text.duration((arm.patch or {}).get("seconds"))))
            spelled = (text.duration, lambda value: text.number(value, "{:,.0f}"), text.memory)
            for value, reference, spell in zip(of_runs(runs(arm, grid)), ours, spelled, strict=True):
                row += [Cell(spell(value)), Cell(_ratio(value, reference))]
            table.rows.append(row)
    return table


def of_evaluation(report: Report) -> Table:
    """A row for each model with a finished task: the time of all tasks, and peak memory."""
    table = Table(["model", "parameters", "items", "evaluation time", "ratio", "peak memory", "ratio"])
    base = find_arm(report, report.baseline)
    ours = _evaluation(base) if base else (None, None, None)
    for arm in report.arms:
        items, seconds, memory = _evaluation(arm)
        row = [Cell(arm.arm, arm=arm.arm), Cell(f"{arm.parameters:,}" if arm.parameters else text.MISSING)]
        row += [Cell(f"{items:,}" if items else text.MISSING)]
        # Times of different sets of tasks cannot be compared.
        row += [Cell(text.duration(seconds)), Cell(_ratio(seconds, ours[1]) if items == ours[0] else text.MISSING)]
        row += [Cell(text.memory(memory)), Cell(_ratio(memory, ours[2]))]
        if items:
            table.rows.append(row)
    return table


def _evaluation(arm: Arm) -> tuple[int | None, float | None, float | None]:
    """Number of items, seconds, and peak memory."""
    run = arm.runs[0]
    return sum(run.items.values()) or None, sum(run.seconds.values()) or None, run.peak_memory_bytes


def _ratio(value: float | None, reference: float | None) -> str:
    return text.MISSING if value is None or not reference else f"{value / reference:.2f}"
