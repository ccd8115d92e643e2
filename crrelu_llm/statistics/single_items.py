"""Single items of a comparison: how each changed from baseline to candidate, and where the two differ most."""

from collections.abc import Sequence
from typing import Any

import numpy as np

POINTS = 200  # of a picture of changes: evenly chosen from the items
EXAMPLES = 2  # the largest changes to either side that are shown


def changes(
    about: dict[str, Any], names: tuple[str, str], before: Sequence[float], after: Sequence[float]
) -> dict[str, Any]:
    """How the items changed, with a sample of them to draw.

    Args:
        about: What the values are: `metric`, `label`, `higher_is_better`, `format`, and anything else to keep.
        names: Baseline and candidate.
        before: The baseline's value of each item: `(items,)`.
        after: The candidate's, in the same order.

    Returns:
        One entry of `changes` in report.json: `about`, the names, the number of `items`, how many became `better`,
        `worse` or stayed `same`, and `points`: pairs of values, of at most `POINTS` items.
    """
    pairs = np.array([before, after], dtype=float).T
    gains = _gains(about, pairs)
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(POINTS, len(pairs))).round().astype(int))
    return {
        **about,
        "baseline": names[0],
        "candidate": names[1],
        "items": len(pairs),
        "better": int(np.sum(gains > 0)),
        "worse": int(np.sum(gains < 0)),
        "same": int(np.sum(gains == 0)),
        "points": [[float(f"{value:.6g}") for value in pair] for pair in pairs[chosen]],
    }


def most_changed(about: dict[str, Any], before: Sequence[float], after: Sequence[float]) -> list[int]:
    """The indices of the items that gained most and lost most, the largest gain first, the largest loss last."""
    gains = _gains(about, np.array([before, after], dtype=float).T)
    order = np.argsort(-gains, kind="stable")
    gained = [int(i) for i in order[:EXAMPLES] if gains[i] > 0]
    lost = [int(i) for i in order[-EXAMPLES:] if gains[i] < 0]
    return gained + [i for i in lost if i not in gained]


def example(
    about: dict[str, Any], names: tuple[str, str], index: int, values: tuple[float, float], shown: dict[str, Any]
) -> dict[str, Any]:
    """One entry of `examples` in report.json.

    Args:
        about: As for `changes`.
        names: Baseline and candidate.
        index: The item's place in the data, from 0.
        values: Of the baseline and of the candidate.
        shown: What to show of it: `prompt`, and `options`, each with its `text`, what `baseline` and `candidate` gave
            it (a number, a text or None), and `right` where that is known.
    """
    gain = values[1] - values[0] if about["higher_is_better"] else values[0] - values[1]
    return {
        **about,
        "baseline": names[0],
        "candidate": names[1],
        "item": index,
        "values": list(values),
        "outcome": "better" if gain > 0 else "worse",
        **shown,
    }


def _gains(about: dict[str, Any], pairs: np.ndarray) -> np.ndarray:
    """By how much the candidate is better: `(items,)`."""
    differences: np.ndarray = pairs[:, 1] - pairs[:, 0]
    return differences if about["higher_is_better"] else -differences
