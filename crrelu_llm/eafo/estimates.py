"""Probability densities of pre-activations without a named formula: smooth ones from samples, and any function."""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from crrelu_llm.eafo.density import Array, Density, Function
from crrelu_llm.errors import InputError

MIN_SAMPLES = 100
# A kernel's width in bins: the variance added by binning, 1/12 of a bin squared, is 0.3 % of the kernel's own.
_BINS_PER_BANDWIDTH = 5
_LARGEST = 1e30


def from_samples(samples: Any, bandwidth: float | None = None, name: str = "samples") -> Density:
    """A smooth density from samples: the kernel estimate with normal kernels, on binned samples.

    Args:
        samples: Numbers of any shape and dtype, at least `MIN_SAMPLES`.
        bandwidth: The kernels' standard deviation, in the samples' units. Default: Silverman's rule,
            0.9·min(s, IQR/1.34)·n^(−1/5) (Silverman, Density Estimation, 1986, eq. 3.31).
        name: The name in messages and plots.

    Raises:
        InputError: There are too few samples, values are not finite, the samples do not vary, or the bandwidth is ≤ 0.
    """
    values = numbers(samples, f"density of {name}")
    if values.size < MIN_SAMPLES:
        raise InputError(f"density of {name}: {values.size} samples are too few; give at least {MIN_SAMPLES}.")
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise InputError(f"density of {name}: {count} of {values.size} samples are NaN or infinite; leave them out.")
    std = float(values.std())
    if np.abs(values).max() > _LARGEST:
        raise InputError(f"density of {name}: a sample is {np.abs(values).max():g}; its square would overflow.")
    if std <= 1e-12 * abs(float(values.mean())) or std == 0:
        raise InputError(f"density of {name}: all {values.size} samples are {values[0]:g}, a constant has no density.")
    if bandwidth is None:
        quartiles = float(np.subtract(*np.percentile(values, [75, 25]))) / 1.34
        bandwidth = 0.9 * (min(std, quartiles) or std) * values.size**-0.2
    if not bandwidth > 0:
        raise InputError(f"density of {name}: a bandwidth of {bandwidth:g} is not above 0.")
    # Equal bins, each represented by the mean of its values; empty bins do not count.
    place = np.floor((values - values.min()) * (_BINS_PER_BANDWIDTH / bandwidth))
    _, place, counts = np.unique(place, return_inverse=True, return_counts=True)
    centers = np.bincount(place, values) / counts
    return _kernels(name, centers, counts / values.size, bandwidth, (float(values.mean()), std))


def numbers(samples: Any, what: str) -> Array:
    """Samples as a flat float64 array.

    Raises:
        InputError: The samples are not real numbers.
    """
    values = np.asarray(samples)
    if values.dtype.kind not in "fiu":
        raise InputError(f"{what}: the samples are of type {values.dtype}; give real numbers.")
    return values.astype(np.float64).ravel()


def _kernels(name: str, centers: Array, weights: Array, width: float, moments: tuple[float, float]) -> Density:
    """A sum of normal kernels of one width, evaluated in blocks that fit in the cache."""
    from scipy.special import ndtr

    scale = 1 / (width * np.sqrt(2 * np.pi))

    def over(term: Function) -> Function:
        def total(x: Array) -> Array:
            flat = x.ravel()
            out = np.empty_like(flat)
            for start in range(0, flat.size, 256):
                block = flat[start : start + 256]
                out[start : start + 256] = term((block[:, None] - centers) / width) @ weights
            return out.reshape(x.shape)

        return total

    mean, std = moments
    return Density(
        name,
        (-np.inf, np.inf),
        mean,
        float(np.hypot(std, width)),
        over(lambda z: scale * np.exp(-z * z / 2)),
        over(lambda z: -scale / width * z * np.exp(-z * z / 2)),
        over(ndtr),
    )


def from_function(pdf: Function, low: float, high: float, name: str = "function") -> Density:
    """A density from any function, after a check that the function is a density.

    Args:
        pdf: Maps float64 arrays to float64 arrays; 0 outside the interval.
        low: Start of the interval where the function is not 0; may be infinite.
        high: End of that interval; may be infinite.
        name: The name in messages and plots.

    Raises:
        InputError: The function is negative or not finite somewhere, cannot be integrated, or does not integrate to 1.
    """
    from scipy.integrate import quad

    def at(x: Array) -> Array:
        return np.where((x >= low) & (x <= high), np.asarray(pdf(np.clip(x, low, high)), dtype=np.float64), 0.0)

    if not low < high:
        raise InputError(f"density {name}: the interval from {low:g} to {high:g} is empty; give low < high.")
    grid = np.concatenate([np.linspace(-50, 50, 20001), *(sign * np.geomspace(50, 1e6, 20001) for sign in (-1, 1))])
    grid = np.sort(grid[(grid >= low) & (grid <= high)])
    if not grid.size:
        grid = np.linspace(low, high, 20001)
    try:
        values = at(grid)
    except (TypeError, ValueError) as error:
        raise InputError(f"density {name} takes no float64 array ({error}); wrap it: numpy.vectorize(pdf).") from None
    if not np.isfinite(values).all():
        where = grid[~np.isfinite(values)][0]
        raise InputError(f"density {name}: it is not finite at {where:g}; a density is a finite number there.")
    if values.min() < 0:
        where = grid[values.argmin()]
        raise InputError(f"density {name}: it is {values.min():g} at {where:g}; a density is nowhere negative.")

    def moment(power: int, lower: float = low, upper: float = high) -> float:
        return float(quad(lambda x: x**power * float(at(np.asarray(x))), lower, upper, limit=500)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mass = moment(0)
        except Warning:
            raise InputError(f"density {name}: its integral from {low:g} to {high:g} does not exist.") from None
    if not abs(mass - 1) < 1e-6:
        raise InputError(f"density {name}: it integrates to {mass:g}; divide it by that: a density integrates to 1.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mean = moment(1)
            std = float(np.sqrt(max(moment(2) - mean**2, 0.0)))
        except Warning:
            raise InputError(
                f"density {name}: its mean or its variance does not exist; EAFO needs both here."
            ) from None
    return _tabulated(name, at, (low, high), mean, std, moment)


def _tabulated(
    name: str, pdf: Function, support: tuple[float, float], mean: float, std: float, moment: Callable[..., float]
) -> Density:
    """A density from a function: its distribution function by cumulative quadrature, its derivative by differences."""
    from scipy.integrate import fixed_quad
    from scipy.interpolate import PchipInterpolator

    low, high = max(support[0], mean - 40 * std), min(support[1], mean + 40 * std)
    knots = np.linspace(low, high, 4001)
    pieces = [fixed_quad(pdf, a, b, n=8)[0] for a, b in pairwise(knots)]
    below = moment(0, support[0], low) if low > support[0] else 0.0
    table = PchipInterpolator(knots, np.clip(below + np.concatenate([[0.0], np.cumsum(pieces)]), 0, 1))
    step = std * 1e-4

    def derivative(x: Array) -> Array:
        # Fourth order; at the ends of the support, the slope just inside, not the jump to 0.
        inside = (x >= support[0]) & (x <= support[1])
        x = np.clip(x, support[0] + 2 * step, support[1] - 2 * step)
        return np.where(inside, differences(x), 0.0)

    def differences(x: Array) -> Array:
        return (8 * (pdf(x + step) - pdf(x - step)) - (pdf(x + 2 * step) - pdf(x - 2 * step))) / (12 * step)

    return Density(name, support, mean, std, pdf, derivative, lambda x: np.clip(table(np.clip(x, low, high)), 0, 1))
