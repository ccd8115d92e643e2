"""What a task measures for one model: metrics with intervals, a value for every item, and the items themselves."""

import math
from dataclasses import field, fields
from typing import Any, Self

import numpy as np

from crrelu_llm.records import Record
from crrelu_llm.report.schema import Sparsity, Values

WEIGHTS = "tokens"  # the name of the items' weights beside their values
SHOWN = 600  # the characters of a prompt or an answer that are kept for the report
# metric -> (label, whether higher is better, format); for the tasks of lm-eval and for our own
KNOWN: dict[str, tuple[str, bool, str]] = {
    "acc": ("accuracy", True, "{:.4f}"),
    "acc_norm": ("accuracy by length-normalised likelihood", True, "{:.4f}"),
    "exact_match": ("exact match", True, "{:.4f}"),
    "perplexity": ("perplexity", False, "{:.3f}"),
    "loss": ("negative log-likelihood (nats)", False, "{:.4f}"),
    "bits_per_byte": ("bits per byte", False, "{:.4f}"),
    "byte_perplexity": ("perplexity of a byte", False, "{:.4f}"),
    "word_perplexity": ("perplexity of a word", False, "{:.3f}"),
    "logp_accuracy": ("the chosen answer is more probable", True, "{:.4f}"),
    "logp_accuracy_norm": ("the chosen answer is more probable per token", True, "{:.4f}"),
    "logp_margin": ("log-probability of chosen minus rejected (nats)", True, "{:.3f}"),
    "reward_accuracy": ("reward accuracy", True, "{:.4f}"),
    "reward_margin": ("reward margin", True, "{:.4f}"),
    "preference_loss": ("DPO loss", False, "{:.4f}"),
    "longer_answer_accuracy": ("accuracy of “the longer answer wins”", True, "{:.4f}"),
}
# The metric of a task that decides the verdict: the first of these with a value for every item.
PRIMARY = (
    *("reward_accuracy", "logp_accuracy", "acc_norm", "acc", "exact_match", "prompt_level_strict_acc"),
    *("bits_per_byte", "loss"),
)
_RESAMPLES = 1999
_HELD = 5_000_000  # the largest number of values in memory during resampling

Column = list[float | None]  # a value per item, in the order of the data; None stands for a number that is not finite
Columns = dict[str, Column]  # by metric
# A trainer's metrics, and its values of items by metric; if metrics are ratios of sums, also the items' `WEIGHTS`.
Evaluated = tuple[dict[str, float], dict[str, list[float]]]


class Item(Record):
    """An item of a task, and the responses of the model. Texts are cut to `SHOWN` characters.

    Attributes:
        id: Its index in the data.
        group: Its paradigm or subject, or an empty text.
        prompt: The end of the prompt.
        options: The answers to choose from; empty if the model writes the answer.
        target: The right answer; if there are options, usually the index of the right one.
        responses: The log-likelihood (nats) of each option, or the text that the model wrote.
    """

    id: int
    group: str
    prompt: str
    options: list[str]
    target: str
    responses: list[float | str | None]


class ItemText(Record):
    """The text of an item in a trainer's evaluation data; `right` says which options are right, by default the first
    of two."""

    prompt: str
    options: list[str]
    right: list[bool] = field(default_factory=lambda: [True, False])


class Measured(Record):
    """The measurements of a task for a model.

    Attributes:
        metrics: The value of each metric.
        items: The values of the items, for each metric that is a mean over items.
        higher_is_better: The direction of each metric, if the task specifies it.
        groups: The metrics of each group, if the task has groups (paradigms, subjects).
        examples: The items themselves.
        shares: Each item's share, for each metric that is a ratio of sums over items (see `shares_of`).
        intervals: The 95 % interval over items, for each metric.
        per_token: The metrics that are comparable only between models with the same tokenizer.
        notes: Remarks for the reader of the report, one line each, such as the number of truncated texts.
        not_finite: The number of items with a value that is not a finite number.
        sparsity: The share of zeros after each activation, if the task measures it (see `sparsity.sparsity`).
    """

    metrics: Values
    items: Columns
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    groups: dict[str, Values] = field(default_factory=dict)
    examples: list[Item] = field(default_factory=list)
    shares: Columns = field(default_factory=dict)
    intervals: dict[str, Column] = field(default_factory=dict)
    per_token: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_finite: int = 0
    sparsity: Sparsity = Sparsity()

    @property
    def given(self) -> dict[str, Any]:
        """All fields, because a result is written with its empty fields too."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def with_intervals(self) -> Self:
        """A copy with the intervals: Wilson's if an item is right or wrong, otherwise those of the bootstrap."""
        ends = {metric: interval(values) for metric, values in self.items.items()}
        if "perplexity" in self.metrics and "loss" in ends:
            low, high = ends["loss"]
            ends["perplexity"] = (exponential(low), exponential(high))
        return self.but(intervals={metric: list(pair) for metric, pair in ends.items()})


def describe_metric(metric: str) -> tuple[str, bool, str]:
    """The label, direction and format of a metric, which may be one that a task defines itself."""
    return KNOWN.get(metric.partition(",")[0], (metric.replace("_", " "), True, "{:.4f}"))


def linearised(sums: Any, weights: Any) -> Column:
    """Values with the mean Σ sums / Σ weights, whose spread is the spread of this ratio over items.

    The perplexity of documents is not the mean of their perplexities, because long documents count more. Each value is
    the ratio plus the influence of the item on it, so that intervals and paired tests of means are valid for the ratio
    (the delta method).

    Args:
        sums: The sum of each item, such as its negative log-likelihood: `(items,)`.
        weights: The weight of each item, such as its number of bytes: `(items,)`.
    """
    sums, weights = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    ratio = sums.sum() / weights.sum()
    return (ratio + (sums - ratio * weights) / weights.mean()).tolist()


def shares_of(sums: Any, weights: Any) -> Column:
    """Each item's share of the ratio Σ sums / Σ weights: values with this ratio as their mean.

    If two models differ by chance alone, the difference of an item's shares is positive as often as negative, whatever
    the item's weight. This is not true of `linearised` values, because each of them contains the ratio. A sign-flip
    test therefore takes the shares.
    """
    sums, weights = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    return (sums / weights.mean()).tolist()


def exponential(value: float) -> float:
    """exp, bounded so that the loss of a destroyed model does not overflow."""
    return math.exp(min(value, 700.0))


def interval(values: Column) -> tuple[float, float]:
    """The 95 % interval of the mean of items: Wilson's if all values are 0 or 1, otherwise the percentile bootstrap's.

    The interval of a single value that is neither 0 nor 1 is the value itself.
    """
    from scipy import stats

    numbers = np.asarray(values, dtype=float)
    if len(numbers) and np.isin(numbers, (0, 1)).all():
        ends = stats.binomtest(int(numbers.sum()), len(numbers)).proportion_ci(0.95, method="wilson")
        return float(ends.low), float(ends.high)
    if len(numbers) < 2 or not np.isfinite(numbers).all() or np.ptp(numbers) == 0:
        mean = float(numbers.mean()) if len(numbers) else math.nan
        return mean, mean
    found = stats.bootstrap(
        (numbers,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, _HELD // len(numbers)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def spread_over_groups(groups: list[str], limit: int) -> list[int]:
    """The sorted indices of `limit` items, taken from the groups in turn; within a group, in the order of the data."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    turns = [(turn, index) for indices in members.values() for turn, index in enumerate(indices)]
    return sorted(index for _, index in sorted(turns, key=lambda entry: entry[0])[:limit])


def wins(differences: np.ndarray) -> np.ndarray:
    """1 for a win, one half for a tie and 0 for a loss, as in every accuracy of pairs."""
    return (differences > 0) + 0.5 * (differences == 0)
