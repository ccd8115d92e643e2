"""The values by which the items of a task are compared: finer than right or wrong, if the task has such values."""

import math
from dataclasses import dataclass

import numpy as np

from crrelu_llm.evaluation.measured import PRIMARY, Column, Item, Measured, describe_metric
from crrelu_llm.statistics.single_items import Option, Shown

# Measured for every item, and finer than the metric that decides the verdict.
_FINER = ("reward_margin", "logp_margin", "loss")


@dataclass
class Contrast:
    """A value for every item of a task, in the order of the data; `metric` is one of the task's, or `"margin"`."""

    metric: str
    label: str
    higher_is_better: bool
    format: str
    values: list[float]


def contrast(result: Measured) -> Contrast | None:
    """The contrast of a task: the reward margin, the lead of the right answer over the others, or a metric.

    Returns:
        None if the task has no values of items.
    """
    items = result.items
    leads = [] if "logp_margin" in items else [_lead(item) for item in result.examples]
    known = [lead for lead in leads if lead is not None]
    if known and len(known) == len(leads) and "acc" in items and set(items["acc"]) <= {0.0, 1.0}:
        label = "log-probability of the right answer less that of the best other (nats)"
        return Contrast("margin", label, True, "{:.3f}", known)
    metric = next((name for name in (*_FINER, *PRIMARY) if name in items), next(iter(items), None))
    if metric is None:
        return None
    label, better, pattern = describe_metric(metric)
    values = _ratios(items[metric], result.shares.get(metric))
    return Contrast(metric, label, result.higher_is_better.get(metric, better), pattern, values)


def shown(item: Item, other: Item) -> Shown:
    """What the report shows of an item: its prompt, and for each option the responses of both models.

    Args:
        item: From the baseline's result.
        other: The same item from the candidate's result.
    """
    right = _right(item)
    texts = item.options or [""] * len(item.responses)
    options = [
        Option(text=text, right=None if right is None else index == right, baseline=mine, candidate=theirs)
        for index, (text, mine, theirs) in enumerate(zip(texts, item.responses, other.responses, strict=False))
    ]
    return Shown(group=item.group, prompt=item.prompt, target=item.target, options=options)


def _ratios(values: Column, shares: Column | None) -> list[float]:
    """Each item's own ratio, if the metric is a ratio of sums over items (it then has shares); otherwise the values.

    The values of such a metric (see `measured.linearised`) contain the ratio of all items, so an unchanged item would
    seem to change. The weight of the item follows from its value and its share.
    """
    linear = np.array(values, dtype=float)
    if shares is None:
        return linear.tolist()
    share = np.array(shares, dtype=float)
    ratio = share.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return (share / ((ratio + share - linear) / ratio)).tolist()


def _lead(item: Item) -> float | None:
    """The log-probability (nats) of the right option minus that of the best other option."""
    right = _right(item)
    responses = [value for value in item.responses if isinstance(value, int | float) and math.isfinite(value)]
    if right is None or not len(responses) == len(item.responses) == len(item.options):
        return None
    return float(responses[right] - max(value for index, value in enumerate(responses) if index != right))


def _right(item: Item) -> int | None:
    """The index of the right option, if there are several."""
    count = len(item.options)
    return int(item.target) if count > 1 and item.target.isdecimal() and int(item.target) < count else None
