"""Single items of a comparison: their changes from baseline to candidate, and the largest changes."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np

from crrelu_llm.records import Record

POINTS = 200  # in a picture of changes: evenly spaced items
EXAMPLES = 2  # the number of examples for each direction of change


class About(Record):
    """The metric, the grid values and the arms that the values of items belong to."""

    metric: str
    label: str
    higher_is_better: bool
    format: str
    grid: dict[str, Any] = field(default_factory=dict)
    baseline: str
    candidate: str


class Change(About):
    """One entry of `changes` in report.json.

    Of the `items`, how many became `better`, became `worse` or stayed the `same`. `points` has the values of baseline
    and candidate for at most `POINTS` items.
    """

    items: int
    better: int
    worse: int
    same: int
    points: list[list[float]]


class Option(Record):
    """An answer, whether it is right (None if unknown), and its value, or the generated text, in each arm."""

    text: str
    right: bool | None
    baseline: float | str | None
    candidate: float | str | None


class Shown(Record):
    """The texts of an item for the report."""

    group: str
    prompt: str
    target: str
    options: list[Option]


class Example(About):
    """One entry of `examples` in report.json.

    `item` is the index of the item in the data, `values` has its values in baseline and candidate, and the last four
    fields have its texts.
    """

    item: int
    values: list[float]
    outcome: str
    group: str
    prompt: str
    target: str
    options: list[Option]


def changes(about: About, before: Sequence[float], after: Sequence[float]) -> Change:
    """The changes of the items, with a sample to draw.

    Args:
        about: The metric, the grid values and the arms.
        before: The baseline's value of each item: `(items,)`.
        after: The candidate's, in the same order.
    """
    pairs = np.array([before, after], dtype=float).T
    gains = _gains(about, pairs)
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(POINTS, len(pairs))).round().astype(int))
    return Change(
        **about.given,
        items=len(pairs),
        better=int(np.sum(gains > 0)),
        worse=int(np.sum(gains < 0)),
        same=int(np.sum(gains == 0)),
        points=[[float(f"{value:.6g}") for value in pair] for pair in pairs[chosen]],
    )


def most_changed(about: About, before: Sequence[float], after: Sequence[float]) -> list[int]:
    """The indices of the items that gained most and lost most, the largest gain first, the largest loss last."""
    gains = _gains(about, np.array([before, after], dtype=float).T)
    order = np.argsort(-gains, kind="stable")
    gained = [int(i) for i in order[:EXAMPLES] if gains[i] > 0]
    lost = [int(i) for i in order[-EXAMPLES:] if gains[i] < 0]
    return gained + [i for i in lost if i not in gained]


def example(about: About, index: int, values: tuple[float, float], shown: Shown) -> Example:
    """The example of the item at an index of the data, with its values in baseline and candidate."""
    gain = values[1] - values[0] if about.higher_is_better else values[0] - values[1]
    outcome = "better" if gain > 0 else "worse"
    return Example(**about.given, item=index, values=list(values), outcome=outcome, **shown.given)


def _gains(about: About, pairs: np.ndarray) -> np.ndarray:
    """The improvement by the candidate, `(items,)`."""
    differences: np.ndarray = pairs[:, 1] - pairs[:, 0]
    return differences if about.higher_is_better else -differences
