"""What single items of a task are compared by: a number of each item that says more than right or wrong."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from crrelu_llm.evaluation.measured import KNOWN, PRIMARY
from crrelu_llm.statistics.single_items import Option, Shown

# Measured for every item, and finer than the metric that the verdict looks at.
_FINER = ("reward_margin", "logp_margin", "loss")


@dataclass
class Contrast:
    """A value for every item of a task, in the order of the data; `metric` is one of the task's, or `"margin"`."""

    metric: str
    label: str
    higher_is_better: bool
    format: str
    values: list[float]


def contrast(result: dict[str, Any]) -> Contrast | None:
    """The contrast of a task's result: the rewards' margin, the right answer's lead over the others, or a metric.

    Args:
        result: What `Measured.as_dict` gave.

    Returns:
        None where the task keeps no values of items.
    """
    items = result["items"]
    leads = [] if "logp_margin" in items else [_lead(example) for example in result["examples"]]
    known = [lead for lead in leads if lead is not None]
    if known and len(known) == len(leads) and "acc" in items and set(items["acc"]) <= {0.0, 1.0}:
        label = "log-probability of the right answer less that of the best other (nats)"
        return Contrast("margin", label, True, "{:.3f}", known)
    metric = next((name for name in (*_FINER, *PRIMARY) if name in items), next(iter(items), None))
    if metric is None:
        return None
    label, better, pattern = KNOWN.get(metric.partition(",")[0], (metric.replace("_", " "), True, "{:.4f}"))
    values = _ratios(items[metric], result.get("shares", {}).get(metric))
    return Contrast(metric, label, result["higher_is_better"].get(metric, better), pattern, values)


def shown(example: dict[str, Any], other: dict[str, Any]) -> Shown:
    """What to show of an item: its prompt, and what baseline and candidate gave each of its options.

    Args:
        example: One of the baseline's result.
        other: The same item of the candidate's.
    """
    right = _right(example)
    texts = example["options"] or [""] * len(example["responses"])
    options = [
        Option(text=text, right=None if right is None else index == right, baseline=mine, candidate=theirs)
        for index, (text, mine, theirs) in enumerate(
            zip(texts, example["responses"], other["responses"], strict=False)
        )
    ]
    return Shown(group=example["group"], prompt=example["prompt"], target=example["target"], options=options)


def _ratios(values: list[float], shares: list[float] | None) -> list[float]:
    """Each item's own ratio, of a metric that is a ratio of sums over items.

    What is kept are values whose mean is the metric (see `measured.linearised`): they hold the ratio of all items too,
    by which an item that did not change would seem to. With the shares, the item's weight follows from them.
    """
    if shares is None:
        return values
    linear, share = np.array(values, dtype=float), np.array(shares, dtype=float)
    ratio = share.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return (share / ((ratio + share - linear) / ratio)).tolist()


def _lead(example: dict[str, Any]) -> float | None:
    """By how much the right option is more probable than the best of the others, in nats."""
    right, responses = _right(example), example["responses"]
    if right is None or len(responses) != len(example["options"]):
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in responses):
        return None
    return float(responses[right] - max(value for index, value in enumerate(responses) if index != right))


def _right(example: dict[str, Any]) -> int | None:
    """The index of the right one of several options."""
    target, count = str(example["target"]), len(example["options"])
    return int(target) if count > 1 and target.isdecimal() and int(target) < count else None
