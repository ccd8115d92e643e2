"""Paired statistics for a candidate arm against a baseline arm: intervals, tests, correction, verdict.

The unit that is paired decides what the answer applies to, and the methods:

- `"item"`: these trained models on other items. The interval is a bootstrap of the mean difference (BCa; percentile
  if BCa is degenerate, and beyond 2000 pairs). The p-value is from a two-sided sign-flip permutation test (exact up to
  13 pairs, the normal limit beyond 2000), or from McNemar's exact test if all numbers are right/wrong outcomes.
- `"seed"`: new training runs, on these items. The interval is Student's, because a bootstrap of a handful of numbers
  has far too little coverage. The p-value is from the permutation test, which assumes only that the differences are
  symmetric, and needs six seeds to go below 0.05.
- `"both"`: new training runs, on other items. Interval and p-value are Student's with two sources of error
  (`intervals.half_width`), and assume that the differences between seeds are about normal.

`eval/results/2026-11-25-statistics` measures the coverage of the intervals and the rate of false verdicts.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from crrelu_llm.records import Record
from crrelu_llm.statistics.intervals import (
    Part,
    accuracy_interval,
    attainable_level,
    fewest_disagreements,
    half_width,
    p_value,
    parts,
    smallest_detectable,
)

Unit = Literal["seed", "item", "both"]
Outcome = Literal["better", "worse", "undecided"]
RESAMPLES = 9999
_ALIKE = "all {} seeds gave exactly the same differences, so they are not separate training runs"
_MANY = 2000  # above: large-sample forms, because BCa grows as n² and resampling signs takes minutes
_BATCH_NUMBERS = 10_000_000  # numbers in memory at once while resampling


class Comparison(Record):
    """One entry of `comparisons` in report.json. A value that cannot be computed is None.

    Attributes:
        unit: The unit that is paired. `n` counts the pairs; for `"both"`, `n` counts items and `n_seeds` seeds.
        test: `"permutation"`, `"mcnemar"`, `"t"` or `"none"`.
        smallest_detectable: The true difference that this test, before any correction for several comparisons, finds
            with probability 0.8 if the spread is as observed; None if it finds none, however large.
        equivalence_margin: The largest negligible difference.
        equivalent: Whether the interval lies within the margin on both sides: two one-sided tests, each at half the
            level.
        no_worse: Whether the interval lies within the margin on the worse side.
        baseline_interval: Wilson's interval of binary outcomes over items; `candidate_interval` likewise.
        note: Why no verdict can be given.
        grid: The grid values of the runs.
        primary: Whether a verdict over several metrics counts this comparison.
    """

    metric: str
    higher_is_better: bool
    baseline: str
    candidate: str
    baseline_mean: float | None
    candidate_mean: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    confidence: float
    p_value: float | None
    p_adjusted: float | None
    unit: Unit
    n: int
    verdict: Outcome
    test: str
    smallest_detectable: float | None = None
    equivalence_margin: float | None = None
    equivalent: bool | None = None
    no_worse: bool | None = None
    baseline_interval: list[float] | None = None
    candidate_interval: list[float] | None = None
    n_seeds: int = 0
    note: str | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    primary: bool | None = None


def smallest_possible_p(n: int) -> float:
    """Smallest two-sided p-value of a sign-flip permutation test over `n` pairs.

    The most extreme outcome is n differences of one sign, and 2 of the 2ⁿ sign patterns are that extreme. The same
    number bounds the coverage of a bootstrap interval: the interval lies between the smallest and the largest
    difference, and a symmetric distribution puts all n on one side of the truth with this probability.
    """
    return min(1.0, 2.0 / 2.0**n)


def compare_metric(
    metric: str,
    higher_is_better: bool,
    baseline: ArrayLike,
    candidate: ArrayLike,
    unit: Unit,
    binary: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    baseline_name: str,
    candidate_name: str,
    margin: float | None = None,
    shares: tuple[ArrayLike, ArrayLike] | None = None,
) -> Comparison:
    """Compares the paired numbers of two arms; the module's docstring describes the methods.

    Args:
        metric: Name of the metric.
        higher_is_better: Whether a larger number is the better one.
        baseline: The baseline's numbers, shape `(n,)`; `(seeds, items)` for `"both"`.
        candidate: The candidate's numbers, with the shape and the order of `baseline`.
        unit: What a pair is: one number per training `"seed"`, one per evaluation `"item"` (averaged over seeds), or
            `"both"`: one per seed and item.
        binary: Whether the numbers are right/wrong outcomes.
        confidence: The coverage of the interval; the level of the test is one minus the coverage.
        seed: Seed of the resampling.
        baseline_name: Name of the baseline arm.
        candidate_name: Name of the candidate arm.
        margin: The largest negligible difference, in the metric's unit; None for no test of equivalence.
        shares: For a ratio of sums over items, each item's share of the baseline's and of the candidate's ratio, with
            the same means as `baseline` and `candidate`; the permutation test uses the differences of the shares.

    Raises:
        ValueError: If the shapes differ or do not fit `unit`, `confidence` is not between 0 and 1, or `margin` is
            not positive.
    """
    before, after = np.asarray(baseline, dtype=float), np.asarray(candidate, dtype=float)
    _check(metric, before, after, unit, confidence, margin)
    unknown: tuple[str, ...] = ("difference", "ci_low", "ci_high", "p_value", "p_adjusted", "smallest_detectable")
    unknown += ("equivalent", "no_worse", "baseline_interval", "candidate_interval")
    more: dict[str, Any] = dict.fromkeys(unknown) | ({"n_seeds": len(before)} if unit == "both" else {})
    comparison = Comparison(
        metric=metric,
        higher_is_better=higher_is_better,
        baseline=baseline_name,
        candidate=candidate_name,
        baseline_mean=_mean(before),
        candidate_mean=_mean(after),
        confidence=confidence,
        unit=unit,
        n=before.shape[-1],
        verdict="undecided",
        test="none",
        equivalence_margin=margin,
        **more,
    )
    flipped = None if shares is None else np.subtract(shares[1], shares[0], dtype=float)
    return _compare(comparison, before, after, binary, seed, flipped)


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Corrects a report's p-values for their number, and updates the verdicts.

    The correction is Benjamini-Hochberg's over all p-values of the same unit. The rows over seeds and the rows over
    items ask the same questions twice, so each unit is a family of its own. The rows marked as `primary`, which a
    verdict counts, are also a family of their own, because many other rows that differ would admit chance findings.

    Args:
        comparisons: The results of `compare_metric` for the whole report.

    Returns:
        Copies, in the same order, with `p_adjusted` and `verdict` filled.
    """
    families: dict[Any, list[int]] = {}
    for i, comparison in enumerate(comparisons):
        if comparison.p_value is not None:
            families.setdefault((comparison.unit, comparison.primary), []).append(i)
    values: dict[int, float] = {}
    for family in families.values():
        corrected = stats.false_discovery_control([comparisons[i].p_value for i in family], method="bh")
        values |= zip(family, map(float, corrected), strict=True)
    adjusted = [comparison.but(p_adjusted=values.get(i)) for i, comparison in enumerate(comparisons)]
    return [comparison.but(verdict=_verdict(comparison)) for comparison in adjusted]


def _check(
    metric: str, before: np.ndarray, after: np.ndarray, unit: Unit, confidence: float, margin: float | None
) -> None:
    if before.shape != after.shape or before.ndim != (2 if unit == "both" else 1):
        wanted = "two equal tables (seeds, items)" if unit == "both" else "two equal lists"
        raise ValueError(f"{metric}: paired numbers of shapes {before.shape} and {after.shape}; give {wanted}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"{metric}: the margin must be a positive number, not {margin}.")


def _compare(
    comparison: Comparison,
    before: np.ndarray,
    after: np.ndarray,
    binary: bool,
    seed: int,
    flipped: np.ndarray | None,
) -> Comparison:
    """Fills the fields that depend on both arms."""
    unit, confidence = comparison.unit, comparison.confidence
    broken = int(np.sum(~(np.isfinite(before) & np.isfinite(after))))
    if broken:
        return comparison.but(note=f"{broken} of {before.size} pairs hold a value that is not a finite number")
    differences = _differences(before, after)
    found = comparison.but(difference=_mean(differences))
    if binary and unit == "item" and len(before):
        found = found.but(
            baseline_interval=accuracy_interval(before, confidence),
            candidate_interval=accuracy_interval(after, confidence),
        )
    note = _obstacle(differences, unit)
    if note:
        return found.but(note=note)
    mcnemar = binary and unit == "item" and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    (low, high), test, p = _evidence(differences, unit, mcnemar, confidence, seed, flipped)
    found = found.but(ci_low=low, ci_high=high, test=test, p_value=p, p_adjusted=p)
    sources = parts(differences, mcnemar)
    found = found.but(smallest_detectable=_smallest_detectable(found, sources))
    if found.equivalence_margin is not None and sources:
        equivalent, no_worse = _equivalence(found, (low, high), found.equivalence_margin, sources)
        found = found.but(equivalent=equivalent, no_worse=no_worse)
    return found.but(verdict=_verdict(found))


def _obstacle(differences: np.ndarray, unit: Unit) -> str | None:
    """The reason why finite pairs allow no test, or None."""
    if differences.ndim == 1:
        n = len(differences)
        if n > 1 and unit == "seed" and differences.any() and np.ptp(differences) == 0:
            return _ALIKE.format(n)
        return f"a paired test needs two pairs or more; there is {n}" if n < 2 else None
    for count, word in zip(differences.shape, ("seed", "item"), strict=True):
        if count < 2:
            return f"a test over seeds and items needs two {word}s or more; there is {count}"
    if differences.any() and (np.ptp(differences, axis=0) == 0).all():
        return _ALIKE.format(len(differences))
    return None


def _evidence(
    differences: np.ndarray, unit: Unit, mcnemar: bool, confidence: float, seed: int, flipped: np.ndarray | None
) -> tuple[tuple[float, float], str, float]:
    """Interval, test and p-value."""
    mean = float(differences.mean())
    if unit == "item":
        ends = _interval(differences, confidence, seed)
    else:
        width = half_width(parts(differences), confidence)
        ends = mean - width, mean + width
    if unit == "both":
        return ends, "t", p_value(mean, parts(differences))
    if mcnemar:
        return ends, "mcnemar", _mcnemar(differences)
    return ends, "permutation", _permutation(differences if flipped is None else flipped, seed)


def _smallest_detectable(comparison: Comparison, sources: list[Part]) -> float | None:
    """None if nothing varied, or if no difference, however large, could have been found."""
    level = _level(comparison)
    if comparison.test == "permutation":
        level = attainable_level(comparison.n, level)
    if not sources or level <= 0:
        return None
    found = smallest_detectable(sources, level)
    if comparison.test == "mcnemar":
        share = fewest_disagreements(comparison.n, level)
        return None if share is None else max(found, share)
    return found


def _equivalence(
    comparison: Comparison, ends: tuple[float, float], margin: float, sources: list[Part]
) -> tuple[bool, bool]:
    """Two one-sided tests, as an interval against a margin; the wider ends of `ends` and Student's interval count."""
    width, mean = half_width(sources, comparison.confidence), comparison.difference or 0.0
    above, below = min(ends[0], mean - width) > -margin, max(ends[1], mean + width) < margin
    return above and below, above if comparison.higher_is_better else below


def _level(comparison: Comparison) -> float:
    return round(1 - comparison.confidence, 12)  # 1 - 0.95 is a little more than 0.05


def _mean(values: np.ndarray) -> float | None:
    if not len(values) or not np.isfinite(values).all():
        return None
    return float(values.mean())


def _differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Candidate minus baseline; differences that are only rounding noise of the subtraction become 0."""
    differences = after - before
    if not len(differences):
        return differences
    noise = 1e-13 * max(np.abs(before).max(), np.abs(after).max())
    differences[np.abs(differences) <= noise] = 0.0
    # A constant difference is one number: resampling its last bits would give an interval of rounding errors.
    return np.full_like(differences, differences[0]) if np.ptp(differences) <= noise else differences


def _interval(differences: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    low = high = math.nan
    for method in ("BCa", "percentile") if len(differences) <= _MANY else ("percentile",):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # scipy warns where BCa is degenerate; the percentile interval follows
            result = stats.bootstrap(
                (differences,),
                np.mean,
                n_resamples=RESAMPLES,
                batch=max(1, _BATCH_NUMBERS // len(differences)),
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(result.low), float(result.high)
        if math.isfinite(low) and math.isfinite(high):
            break
    return low, high


def _permutation(differences: np.ndarray, seed: int) -> float:
    if not differences.any():
        return 1.0
    if len(differences) > _MANY:  # random signs give a sum of mean 0 and variance Σd², normal in the limit
        return float(2 * stats.norm.sf(abs(differences.sum()) / np.sqrt(np.sum(differences**2))))
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",  # with one sample: flips the signs
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_NUMBERS // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _mcnemar(differences: np.ndarray) -> float:
    won, lost = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _verdict(comparison: Comparison) -> Outcome:
    p, low, high, mean = comparison.p_adjusted, comparison.ci_low, comparison.ci_high, comparison.difference
    if p is None or low is None or high is None or mean is None:
        return "undecided"
    if p >= _level(comparison) or low <= 0 <= high:
        return "undecided"
    return "better" if (mean > 0) == comparison.higher_is_better else "worse"
