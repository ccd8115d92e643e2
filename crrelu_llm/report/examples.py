"""The items on which the candidate differs most from the baseline, side by side."""

from dataclasses import dataclass

from crrelu_llm.report import text
from crrelu_llm.report.schema import Grid, Report
from crrelu_llm.report.tables import Cell, Table
from crrelu_llm.statistics import single_items

_EMPTY = "(empty)"


@dataclass
class Example:
    """One item: its name, its outcome, its change, its prompt, and the values or answers of both arms."""

    name: str
    outcome: str
    change: str
    prompt: str
    table: Table


@dataclass
class Task:
    """The examples of one task."""

    label: str
    examples: list[Example]


def examples(report: Report, candidate: str | None, grid: Grid) -> list[Task]:
    """The examples of the arm that the verdict is about, by task, in the report's order."""
    tasks: dict[str, Task] = {}
    for entry in report.examples:
        if (entry.candidate, entry.grid) == (candidate, grid):
            task = tasks.setdefault(entry.metric, Task(entry.label, []))
            task.examples.append(_example(entry))
    return list(tasks.values())


def _example(entry: single_items.Example) -> Example:
    before, after = (text.number(value, entry.format) for value in entry.values)
    group = f", {entry.group}" if entry.group else ""
    name, change = f"item {entry.item}{group}", f"{before} → {after}"
    return Example(name, entry.outcome, change, entry.prompt, _options(entry))


def _options(entry: single_items.Example) -> Table:
    """The value of each option in both arms: a log-probability, or a generated text."""
    options = entry.options
    known = any(option.right is not None for option in options)
    given = any(option.baseline is not None for option in options)
    columns = ["option", *(["right or wrong"] if known else []), *([entry.baseline, entry.candidate] if given else [])]
    texts = any(isinstance(option.baseline, str) for option in options)
    table = Table(columns, words=len(columns) if texts else 2 if known else 1)
    for option in options:
        row = [Cell(option.text or _EMPTY)]
        row += [Cell("right" if option.right else "wrong")] if known else []
        row += [Cell(_given(value)) for value in (option.baseline, option.candidate)] if given else []
        table.rows.append(row)
    return table


def _given(value: float | str | None) -> str:
    return value if isinstance(value, str) else text.number(value, "{:.3f}")
