"""Intervals, p-values and power from the sources of error of a mean paired difference (seeds, items)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

POWER = 0.8  # of the smallest detectable difference
_SMALLEST_P = 1e-12  # the smallest p-value: the tails of the model are not known beyond it
_GRID = 32  # points for each variance, to average over its sampling distribution


@dataclass(frozen=True)
class Part:
    """One source of error of a mean: its squared standard error, and the degrees of freedom behind that estimate."""

    variance: float
    df: float


def parts(differences: np.ndarray, binary: bool = False) -> list[Part]:
    """The sources of error of the mean of paired differences.

    Differences of shape `(seeds, items)` have two: the seeds (variance of the seeds' means) and the items (variance
    of the items' means). Seeds and items are crossed, because every run is evaluated on the same items. The
    interaction of seed and item enters both variances, so their sum is too large rather than too small.

    Args:
        differences: Shape `(n,)` or `(seeds, items)`, two or more along each axis.
        binary: Whether `differences` are of right/wrong outcomes, shape `(n,)`. One extra pair is then added to each
            kind of disagreement (Bonett and Price 2012), so that the variance is not 0 for a few pairs without
            any disagreement.

    Returns:
        The sources whose variance is not 0.
    """
    if binary:
        n = len(differences)
        won, lost = ((np.sum(sign * differences > 0) + 1) / (n + 2) for sign in (1, -1))
        return [Part(float(won + lost - (won - lost) ** 2) / (n + 2), math.inf)]
    means = [differences] if differences.ndim == 1 else [differences.mean(axis=1), differences.mean(axis=0)]
    found = [Part(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in means]
    return [part for part in found if part.variance > 0]


def half_width(sources: Sequence[Part], confidence: float) -> float:
    """Half the width of the interval for a mean: the half-widths by each source, added in quadrature.

    For one source this is Student's interval. For several independent normal sources the coverage is at least
    `confidence`, whatever the variances (Banerjee 1960). With a bootstrap or a pooled variance the coverage is too low
    if one source is a handful of seeds.
    """
    tail = (1 - confidence) / 2
    return math.sqrt(sum(special.stdtrit(part.df, tail) ** 2 * part.variance for part in sources))


def p_value(difference: float, sources: Sequence[Part]) -> float:
    """Two-sided p-value of a mean difference: one minus the confidence at which the interval just reaches 0."""
    if difference == 0:
        return 1.0
    low, high = math.log(_SMALLEST_P), 0.0

    def gap(log_p: float) -> float:
        return half_width(sources, 1 - math.exp(log_p)) - abs(difference)

    return _SMALLEST_P if gap(low) < 0 else float(math.exp(optimize.brentq(gap, low, high)))


def smallest_detectable(sources: Sequence[Part], level: float, power: float = POWER) -> float:
    """The true difference for which the interval at confidence `1 - level` excludes 0 with probability `power`.

    The true variances are taken as known; their estimates vary between experiments according to their degrees of
    freedom. For one source this is the power of the t-test.
    """
    error = math.sqrt(sum(part.variance for part in sources))
    squared = np.zeros(1)
    middles = (np.arange(_GRID) + 0.5) / _GRID
    for part in sources:
        ratios = np.ones(1) if math.isinf(part.df) else special.gammaincinv(part.df / 2, middles) * 2 / part.df
        squared = (squared[:, None] + special.stdtrit(part.df, level / 2) ** 2 * part.variance * ratios).ravel()
    widths = np.sqrt(squared)

    def missing(true: float) -> float:
        found = special.ndtr((true - widths) / error) + special.ndtr((-true - widths) / error)
        return float(found.mean()) - power

    return float(optimize.brentq(missing, 0.0, float(widths.max()) + 10 * error, rtol=1e-6))


def attainable_level(n: int, level: float) -> float:
    """The largest p-value below `level` of a sign-flip test over `n` pairs, 0 if there is none.

    Such a test works at this level, not at `level`: its p-values are multiples of 2/2ⁿ.
    """
    if n > 30:
        return level
    patterns = math.ceil(round(level * 2**n / 2, 9)) - 1
    return 2 * patterns / 2**n


def fewest_disagreements(n: int, level: float, power: float = POWER) -> float | None:
    """The smallest share of `n` pairs that must change, all in one direction, for McNemar's exact test to find it.

    Returns:
        The share at which enough pairs change with probability `power`; None where `n` pairs are never enough.
    """
    needed = next(k for k in range(1, 1100) if 2 / 2**k < level)
    if n < needed:
        return None
    return float(optimize.brentq(lambda share: stats.binom.sf(needed - 1, n, share) - power, 0.0, 1.0))


def accuracy_interval(values: np.ndarray, confidence: float) -> list[float]:
    """Wilson's interval for an accuracy.

    Args:
        values: Outcomes between 0 and 1, shape `(items,)`. If they are means over seeds, the number of right
            items is rounded, and the seeds do not count as more items.
        confidence: Coverage of the interval.
    """
    right = round(float(values.sum()))
    interval = stats.binomtest(right, len(values)).proportion_ci(confidence, method="wilson")
    return [float(interval.low), float(interval.high)]
