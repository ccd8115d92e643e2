"""Paired statistics for a candidate arm against a baseline arm: intervals, tests, correction, verdict.

What is paired decides what the answer is about, and how it is found:

- `"item"`: these trained models on other items. The interval is a bootstrap of the mean difference (BCa; percentile
  where BCa is degenerate, and beyond 2000 pairs). The p-value is that of a two-sided sign-flip permutation test (exact
  up to 13 pairs, its normal limit beyond 2000), or of McNemar's exact test where all numbers are right/wrong outcomes.
- `"seed"`: models trained anew, on these items. The interval is Student's, as a bootstrap of a handful of numbers
  covers far less often than it says; the p-value is that of the permutation test, which assumes nothing of their
  distribution but symmetry and needs six seeds to go below 0.05.
- `"both"`: models trained anew, on other items. Interval and p-value are Student's with two sources of error
  (`intervals.half_width`), and assume that the differences of seeds are about normal.

Fields of an entry beside those that the report's readers know: `test` (`"permutation"`, `"mcnemar"`, `"t"`, `"none"`);
`smallest_detectable`, the true difference that this test, before any correction for several comparisons, finds with
probability 0.8 if the spread is as observed (None where it finds none, however large); `equivalent` and `no_worse`,
whether the interval lies within `equivalence_margin` on both sides, or on the worse one, which is two one-sided tests
or one, each at half the level; `baseline_interval` and `candidate_interval`, Wilson's, of binary outcomes over items;
`n_seeds` where `unit` is `"both"`, whose `n` counts the items. `eval/results/2026-11-25-statistics` has measured how
often the intervals cover and the verdicts are false.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

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
RESAMPLES = 9999
_ALIKE = "all {} seeds gave exactly the same differences, so they are not trainings anew"
_MANY = 2000  # beyond: the large-sample forms, as BCa grows as n² and resampled signs take minutes
_BATCH_NUMBERS = 10_000_000  # numbers held at once while resampling: bounded memory, few batches


def smallest_possible_p(n: int) -> float:
    """Smallest two-sided p-value of a sign-flip permutation test over `n` pairs.

    All n differences of one sign is the most extreme outcome, and 2 of the 2ⁿ sign patterns are that extreme.
    The same number bounds a bootstrap interval: it lies between the smallest and the largest difference, and a
    symmetric distribution puts all n on one side of the truth with this probability.
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
) -> dict[str, Any]:
    """Compares the paired numbers of two arms; the module's docstring says how.

    Args:
        metric: Name of the metric.
        higher_is_better: Whether a larger number is the better one.
        baseline: The baseline's numbers, shape `(n,)`; `(seeds, items)` for `"both"`.
        candidate: The candidate's numbers, of the same shape and in the order of `baseline`.
        unit: What a pair is: one number per training `"seed"`, one per evaluation `"item"` (averaged over seeds), or
            `"both"`: one per seed and item.
        binary: Whether the numbers are right/wrong outcomes.
        confidence: Coverage of the interval; one minus it is the level of the test.
        seed: Seed of the resampling.
        baseline_name: Name of the baseline arm.
        candidate_name: Name of the candidate arm.
        margin: The largest difference that counts as none, in the metric's unit; None to ask no such question.
        shares: Of a ratio of sums over items, each item's share of the baseline's and of the candidate's, with the
            same means as `baseline` and `candidate`; the permutation test is over their differences.

    Returns:
        One entry of `comparisons` in report.json. What cannot be computed is None; where no verdict can be given, a
        `note` says why.

    Raises:
        ValueError: If the shapes differ or do not fit `unit`, `confidence` is not between 0 and 1, or `margin` is
            not positive.
    """
    before, after = np.asarray(baseline, dtype=float), np.asarray(candidate, dtype=float)
    _check(metric, before, after, unit, confidence, margin)
    comparison = _blank(metric, higher_is_better, unit, before.shape, confidence, margin)
    comparison |= {"baseline": baseline_name, "candidate": candidate_name}
    comparison |= {"baseline_mean": _mean(before), "candidate_mean": _mean(after)}
    flipped = None if shares is None else np.subtract(shares[1], shares[0], dtype=float)
    return comparison | _compare(comparison, before, after, binary, seed, flipped)


def adjust(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Corrects a report's p-values for their number, and draws the verdicts anew.

    Benjamini-Hochberg over all p-values of the same unit: the seeds' and the items' rows ask the same questions
    twice, so each unit is a family of its own. So are the rows that a verdict counts, where they are marked as
    `primary`: many other rows that differ would let chance into it.

    Args:
        comparisons: What `compare_metric` returned, for the whole report. Left unchanged.

    Returns:
        Copies, in the same order, with `p_adjusted` and `verdict` filled.
    """
    adjusted = [comparison | {"p_adjusted": None} for comparison in comparisons]
    families: dict[Any, list[dict[str, Any]]] = {}
    for comparison in adjusted:
        if comparison["p_value"] is not None:
            families.setdefault((comparison["unit"], comparison.get("primary")), []).append(comparison)
    for family in families.values():
        values = stats.false_discovery_control([comparison["p_value"] for comparison in family], method="bh")
        for comparison, value in zip(family, values, strict=True):
            comparison["p_adjusted"] = float(value)
    for comparison in adjusted:
        comparison["verdict"] = _verdict(comparison)
    return adjusted


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


def _blank(
    metric: str, higher_is_better: bool, unit: Unit, shape: tuple[int, ...], confidence: float, margin: float | None
) -> dict[str, Any]:
    found = {
        **{"metric": metric, "higher_is_better": higher_is_better},
        **dict.fromkeys(("baseline", "candidate", "baseline_mean", "candidate_mean")),
        **dict.fromkeys(("difference", "ci_low", "ci_high")),
        **{"confidence": confidence, "p_value": None, "p_adjusted": None, "unit": unit, "n": shape[-1]},
        **{"verdict": "undecided", "test": "none", "smallest_detectable": None, "equivalence_margin": margin},
        **dict.fromkeys(("equivalent", "no_worse", "baseline_interval", "candidate_interval")),
    }
    return found | ({"n_seeds": shape[0]} if unit == "both" else {})


def _compare(
    comparison: dict[str, Any],
    before: np.ndarray,
    after: np.ndarray,
    binary: bool,
    seed: int,
    flipped: np.ndarray | None,
) -> dict[str, Any]:
    """All that depends on both arms."""
    unit, confidence = comparison["unit"], comparison["confidence"]
    broken = int(np.sum(~(np.isfinite(before) & np.isfinite(after))))
    if broken:
        return {"note": f"{broken} of {before.size} pairs hold a value that is not a finite number"}
    differences = _differences(before, after)
    found: dict[str, Any] = {"difference": _mean(differences)}
    if binary and unit == "item" and len(before):
        found["baseline_interval"] = accuracy_interval(before, confidence)
        found["candidate_interval"] = accuracy_interval(after, confidence)
    note = _obstacle(differences, unit)
    if note:
        return found | {"note": note}
    mcnemar = binary and unit == "item" and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    found |= _evidence(differences, unit, mcnemar, confidence, seed, flipped)
    sources = parts(differences, mcnemar)
    found |= {"p_adjusted": found["p_value"]}
    found |= {"smallest_detectable": _smallest_detectable(comparison | found, sources)}
    found |= _equivalence(comparison | found, sources)
    return found | {"verdict": _verdict(comparison | found)}


def _obstacle(differences: np.ndarray, unit: Unit) -> str | None:
    """Why finite pairs allow no test, or None."""
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
) -> dict[str, Any]:
    """Interval, test and p-value."""
    mean = float(differences.mean())
    if unit == "item":
        low, high = _interval(differences, confidence, seed)
    else:
        width = half_width(parts(differences), confidence)
        low, high = mean - width, mean + width
    if unit == "both":
        test, p = "t", p_value(mean, parts(differences))
    elif mcnemar:
        test, p = "mcnemar", _mcnemar(differences)
    else:
        test, p = "permutation", _permutation(differences if flipped is None else flipped, seed)
    return {"ci_low": low, "ci_high": high, "test": test, "p_value": p}


def _smallest_detectable(comparison: dict[str, Any], sources: list[Part]) -> float | None:
    """None where nothing varied, or no difference, however large, could have been found."""
    level = _level(comparison)
    if comparison["test"] == "permutation":
        level = attainable_level(comparison["n"], level)
    if not sources or level <= 0:
        return None
    found = smallest_detectable(sources, level)
    if comparison["test"] == "mcnemar":
        share = fewest_disagreements(comparison["n"], level)
        return None if share is None else max(found, share)
    return found


def _equivalence(comparison: dict[str, Any], sources: list[Part]) -> dict[str, bool]:
    """Two one-sided tests, as an interval against a margin; of two intervals (bootstrap, Student) the wider ends."""
    margin, mean = comparison["equivalence_margin"], comparison["difference"]
    if margin is None or not sources:
        return {}
    width = half_width(sources, comparison["confidence"])
    low, high = min(comparison["ci_low"], mean - width), max(comparison["ci_high"], mean + width)
    above, below = low > -margin, high < margin
    return {"equivalent": above and below, "no_worse": above if comparison["higher_is_better"] else below}


def _level(comparison: dict[str, Any]) -> float:
    return round(1 - comparison["confidence"], 12)  # 1 - 0.95 is a little more than 0.05


def _mean(values: np.ndarray) -> float | None:
    if not len(values) or not np.isfinite(values).all():
        return None
    return float(values.mean())


def _differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Candidate minus baseline, with the rounding noise of the subtraction removed where it is all there is."""
    differences = after - before
    if not len(differences):
        return differences
    noise = 1e-13 * max(np.abs(before).max(), np.abs(after).max())
    differences[np.abs(differences) <= noise] = 0.0
    # A constant offset is one number: resampling its last bits would give an interval of rounding errors.
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


def _verdict(comparison: dict[str, Any]) -> str:
    p, low, high = comparison["p_adjusted"], comparison["ci_low"], comparison["ci_high"]
    if p is None or low is None or high is None:
        return "undecided"
    if p >= _level(comparison) or low <= 0 <= high:
        return "undecided"
    return "better" if (comparison["difference"] > 0) == comparison["higher_is_better"] else "worse"
