"""Paired statistics for a candidate arm against a baseline arm: intervals, tests, correction, verdict."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

RESAMPLES = 9999
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
    baseline: Sequence[float],
    candidate: Sequence[float],
    unit: Literal["seed", "item"],
    binary: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    baseline_name: str,
    candidate_name: str,
) -> dict[str, Any]:
    """Compares the paired numbers of two arms.

    The interval is a bootstrap of the mean paired difference (BCa; percentile where BCa is degenerate, and beyond
    2000 pairs). The p-value is that of a two-sided sign-flip permutation test of the differences (exact up to 13
    pairs, its normal limit beyond 2000), or of McNemar's exact test where `binary` is true and all numbers are 0 or
    1. `p_adjusted` is `p_value` until `adjust` has seen the other comparisons.

    Args:
        metric: Name of the metric.
        higher_is_better: Whether a larger number is the better one.
        baseline: The baseline's numbers, shape `(n,)`.
        candidate: The candidate's numbers, shape `(n,)`, in the order of `baseline`.
        unit: What a pair is: one number per training `"seed"`, or one per evaluation `"item"` (averaged over seeds).
        binary: Whether the numbers are right/wrong outcomes.
        confidence: Coverage of the interval; one minus it is the level of the test.
        seed: Seed of the resampling.
        baseline_name: Name of the baseline arm.
        candidate_name: Name of the candidate arm.

    Returns:
        One entry of `comparisons` in report.json, with `test` (`"permutation"`, `"mcnemar"` or `"none"`), and a
        `note` where no verdict can be given. What cannot be computed is None.

    Raises:
        ValueError: If the lengths differ, or `confidence` is not between 0 and 1.
    """
    before, after = np.asarray(baseline, dtype=float), np.asarray(candidate, dtype=float)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"{metric}: paired numbers of shapes {before.shape} and {after.shape}; give two equal lists.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    comparison: dict[str, Any] = {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "baseline": baseline_name,
        "candidate": candidate_name,
        "baseline_mean": _mean(before),
        "candidate_mean": _mean(after),
        "difference": None,
        "ci_low": None,
        "ci_high": None,
        "confidence": confidence,
        "p_value": None,
        "p_adjusted": None,
        "unit": unit,
        "n": len(before),
        "verdict": "undecided",
        "test": "none",
    }
    broken = int(np.sum(~(np.isfinite(before) & np.isfinite(after))))
    if broken:
        return comparison | {"note": f"{broken} of {len(before)} pairs hold a value that is not a finite number"}
    differences = _differences(before, after)
    comparison["difference"] = _mean(differences)
    if len(differences) < 2:
        return comparison | {"note": f"a paired test needs two pairs or more; there is {len(differences)}"}
    comparison["ci_low"], comparison["ci_high"] = _interval(differences, confidence, seed)
    if binary and np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        comparison["test"], comparison["p_value"] = "mcnemar", _mcnemar(differences)
    else:
        comparison["test"], comparison["p_value"] = "permutation", _permutation(differences, seed)
    comparison["p_adjusted"] = comparison["p_value"]
    return comparison | {"verdict": _verdict(comparison)}


def adjust(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Corrects a report's p-values for their number, and draws the verdicts anew.

    Benjamini-Hochberg over all p-values of the same unit: the seeds' and the items' rows ask the same questions
    twice, so each unit is a family of its own.

    Args:
        comparisons: What `compare_metric` returned, for the whole report. Left unchanged.

    Returns:
        Copies, in the same order, with `p_adjusted` and `verdict` filled.
    """
    adjusted = [comparison | {"p_adjusted": None} for comparison in comparisons]
    for unit in {comparison["unit"] for comparison in adjusted}:
        family = [c for c in adjusted if c["unit"] == unit and c["p_value"] is not None]
        if family:
            values = stats.false_discovery_control([c["p_value"] for c in family], method="bh")
            for comparison, value in zip(family, values, strict=True):
                comparison["p_adjusted"] = float(value)
    for comparison in adjusted:
        comparison["verdict"] = _verdict(comparison)
    return adjusted


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
    level = round(1 - comparison["confidence"], 12)  # 1 - 0.95 is a little more than 0.05
    if p >= level or low <= 0 <= high:
        return "undecided"
    return "better" if (comparison["difference"] > 0) == comparison["higher_is_better"] else "worse"
