"""Reads the report's dict: plain values, the arms, their runs and grid values, and what the headline is."""

from dataclasses import dataclass, field
from typing import Any

Report = dict[str, Any]
Grid = dict[str, Any]
_CONTROLS = ("native", "relu")


@dataclass
class Verdict:
    """The sentence, its outcome (`"better"`, `"worse"`, `"undecided"`), and the arm and grid value it speaks of; the
    comparison that it rests on, where it is one, and the seeds in it."""

    sentence: str
    outcome: str = "undecided"
    candidate: str | None = None
    grid: Grid = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    seeds: int = 0


def is_evaluation(report: Report) -> bool:
    """Whether the report is that of `crrelu eval`: checkpoints as they are, no training runs."""
    return report.get("trainer") == "eval"


def candidates(report: Report) -> list[str]:
    """The arms that the verdict is about: those with CRReLU, or else those that are neither baseline nor control."""
    others = [arm for arm in report.get("arms", []) if arm.get("arm") != report.get("baseline")]
    for wanted in (
        [arm for arm in others if arm.get("activation") == "crrelu"],
        [arm for arm in others if arm["arm"] not in _CONTROLS],
        others,
    ):
        if wanted:
            return [arm["arm"] for arm in wanted]
    return []


def grids(report: Report) -> list[Grid]:
    """The grid values of the runs, in the order of their appearance; `[{}]` without a grid."""
    found: list[Grid] = []
    for arm in report.get("arms", []):
        for run in arm.get("runs", []):
            grid = run.get("grid") or {}
            if grid not in found:
                found.append(grid)
    return found or [{}]


def runs(arm: dict[str, Any], grid: Grid, finished: bool = True) -> list[dict[str, Any]]:
    """An arm's runs at a grid value, the finished ones only unless told otherwise."""
    return [
        run
        for run in arm.get("runs", [])
        if (run.get("grid") or {}) == grid and (not finished or run.get("status") == "done")
    ]


def by_seed(arm: dict[str, Any], grid: Grid, metric: str) -> dict[int, float]:
    """A metric's value of each finished run that has one."""
    values = {run["seed"]: (run.get("metrics") or {}).get(metric) for run in runs(arm, grid)}
    return {seed: value for seed, value in values.items() if value is not None}


def find_arm(report: Report, name: str | None) -> dict[str, Any] | None:
    """The arm of that name, or None."""
    return next((arm for arm in report.get("arms", []) if arm.get("arm") == name), None)


def metrics(report: Report) -> dict[str, dict[str, Any]]:
    """All metrics, declared or only measured, with label, direction, format and whether it is a reference."""
    described = {name: dict(description) for name, description in (report.get("metrics") or {}).items()}
    for arm in report.get("arms", []):
        for run in arm.get("runs", []):
            for name in run.get("metrics") or {}:
                described.setdefault(name, {})
    for name, description in described.items():
        description.setdefault("label", name.replace("_", " "))
        description.setdefault("higher_is_better", False)
        description.setdefault("format", "{:.4g}")
        description.setdefault("reference", False)
    return described


def describe(report: Report, metric: str) -> dict[str, Any]:
    """The description of one metric, also of one that no run has."""
    fallback = {"label": metric.replace("_", " "), "higher_is_better": False, "format": "{:.4g}", "reference": False}
    return metrics(report).get(metric, fallback)


def items_word(report: Report) -> str:
    """What an evaluation item is called."""
    return str(report.get("items") or "items")


def paired_over(report: Report, entry: dict[str, Any]) -> str:
    """What a comparison's pairs are, with their number: `3 seeds`, `60 documents`, `60 documents × 3 seeds`."""
    if entry["unit"] == "seed":
        return f"{entry['n']} seed{'s' if entry['n'] != 1 else ''}"
    items = f"{entry['n']} {items_word(report)}"
    return f"{items} × {entry['n_seeds']} seeds" if entry["unit"] == "both" else items
