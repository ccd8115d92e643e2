"""What one task gives for one model: metrics with intervals, a value for every item, and a look at the items."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

# metric -> (label, whether higher is better, format); of lm-eval's tasks and of our own
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
    "logp_margin": ("log-probability of chosen less rejected (nats)", True, "{:.3f}"),
    "reward_accuracy": ("reward accuracy", True, "{:.4f}"),
    "reward_margin": ("reward margin", True, "{:.4f}"),
    "preference_loss": ("DPO loss", False, "{:.4f}"),
    "longer_answer_accuracy": ("accuracy of “the longer answer wins”", True, "{:.4f}"),
}
# The metric of a task that the verdict looks at: the first of these that it has a value of every item of.
PRIMARY = (
    *("reward_accuracy", "logp_accuracy", "acc_norm", "acc", "exact_match", "prompt_level_strict_acc"),
    *("bits_per_byte", "loss"),
)
_RESAMPLES = 1999
_HELD = 5_000_000  # numbers held at once while resampling


@dataclass
class Measured:
    """The result of a task for a model.

    Attributes:
        metrics: Value by metric.
        items: For a metric that is a mean over items, the items' values, in the order of the data.
        higher_is_better: By metric, where the task says so.
        groups: Of a task made of groups (paradigms, subjects): the metrics of each.
        examples: One dict an item: `id`, `group`, `prompt`, `options`, `target`, `responses`.
        shares: For a metric that is a ratio of sums over items, each item's share of it (see `shares_of`).
        intervals: 95 % interval over the items, by metric.
        per_token: Metrics that are comparable only between models with the same tokenizer.
        notes: What a reader should know, a line each: texts that were cut.
        not_finite: How many items gave a value that is no finite number.
        sparsity: Of a text: the share of zeros after each activation (see `sparsity.sparsity`).
    """

    metrics: dict[str, float]
    items: dict[str, list[float]]
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_token: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_finite: int = 0
    sparsity: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> "Measured":
        """Adds the intervals, Wilson's of what is right or wrong and the bootstrap's of the rest; returns itself."""
        for metric, values in self.items.items():
            self.intervals[metric] = interval(values)
        if "perplexity" in self.metrics and "loss" in self.intervals:
            low, high = self.intervals["loss"]
            self.intervals["perplexity"] = (exponential(low), exponential(high))
        return self

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def linearised(sums: Any, weights: Any) -> list[float]:
    """Values whose mean is the ratio Σ sums / Σ weights, and whose spread is that of this ratio over items.

    A perplexity over documents is no mean of the documents' perplexities: long ones count more. The values are the
    ratio plus each item's influence on it, so that intervals and paired tests of means hold for the ratio (the delta
    method).

    Args:
        sums: An item's sum, such as its negative log-likelihood: `(items,)`.
        weights: An item's weight, such as its bytes: `(items,)`.
    """
    sums, weights = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    ratio = sums.sum() / weights.sum()
    return (ratio + (sums - ratio * weights) / weights.mean()).tolist()


def shares_of(sums: Any, weights: Any) -> list[float]:
    """Each item's share of the ratio Σ sums / Σ weights: values whose mean is the ratio.

    Where two models differ by chance alone, the difference of an item's shares is as often positive as negative, of
    whatever weight it is. Of `linearised` values that does not hold, as each of them contains the ratio itself: a test
    that flips signs takes these.
    """
    sums, weights = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    return (sums / weights.mean()).tolist()


def exponential(value: float) -> float:
    """exp, of what a destroyed model gives too."""
    return math.exp(min(value, 700.0))


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of items: Wilson's of what is 0 or 1, else the percentile bootstrap's.

    One item that is neither gives no interval but itself.
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
    """Indices of `limit` items, taken in turn from each group in its order; sorted."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    turns = [(turn, index) for indices in members.values() for turn, index in enumerate(indices)]
    return sorted(index for _, index in sorted(turns, key=lambda entry: entry[0])[:limit])


def wins(differences: np.ndarray) -> np.ndarray:
    """1 for a win, one half for a tie: in every accuracy of pairs."""
    return (differences > 0) + 0.5 * (differences == 0)
