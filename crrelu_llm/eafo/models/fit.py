"""Fits each site's density in a model, and tests whether mean and deviation are enough for its correction."""

import math
from typing import Any

import numpy as np

from crrelu_llm.eafo import density, entropy
from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.models.densities import smooth
from crrelu_llm.eafo.models.preactivations import Preactivations

DOCUMENT = "eafo_fit.json"
_POINTS = 4001
_CURVE_POINTS = 201


def fit(sites: list[Preactivations]) -> list[dict[str, Any]]:
    """Fits every site.

    The correction of ReLU for a density p is p′ (f″ = 0). For a normal density it is −(x−μ)·exp(−(x−μ)²/2σ²), up to a
    factor absorbed by a learnable ε: on x > 0, where the theory applies, and in CRReLU's extension on the whole line.

    Args:
        sites: From `preactivations.measure`.

    Returns:
        For each site: `path`, `original`, `count`; `mean`, `std`, `skewness`, `kurtosis` (excess) of its
        pre-activations, over all channels; `channels`: `between` (deviation of the channels' means) and `within`
        (root mean square of the channels' deviations), with between² + within² = std²; `positive`: the probability
        above 0; `entropy`, `negentropy` of the smooth density in nats; `center`, `width` of the normal's correction;
        `agreement` of the smooth density's own correction with the normal's (`fitted`) and with that of N(0, 1), as in
        plain CRReLU (`standard`), on `positive` x and on the `whole` line: a correlation weighted by the density, not
        centred because ε multiplies and does not shift, None where the density has no mass; `curves`: `x`, `density`,
        `normal`, `correction`, `normal_correction` for a plot.

    Raises:
        InputError: There are too few samples, or they do not vary.
    """
    return [_fit(site) for site in sites]


def of_a_normal(samples: int, seed: int = 0) -> float:
    """The agreement, on the whole line, of samples of N(0, 1) with N(0, 1): below 1 only by the noise of p′.

    Args:
        samples: The number of samples, at least `density.MIN_SAMPLES`.
        seed: The seed of the samples.
    """
    x = np.random.default_rng(seed).standard_normal(samples)
    zero = np.zeros(1)
    site = Preactivations("normal", "", samples, 0.0, 1.0, 0.0, 0.0, zero, zero + 1, x)
    agreement = _agreement(smooth(site, for_derivative=True), density.normal())["whole"]
    assert agreement is not None
    return agreement


def _fit(site: Preactivations) -> dict[str, Any]:
    rough, found, fitted = smooth(site), smooth(site, for_derivative=True), density.normal(site.mean, site.std)
    h = entropy.of_density(rough)
    within = math.sqrt(float(np.mean(site.channel_stds**2)))
    return {
        "path": site.path,
        "original": site.original,
        "count": site.count,
        "mean": site.mean,
        "std": site.std,
        "skewness": site.skewness,
        "kurtosis": site.kurtosis,
        "channels": {"between": float(site.channel_means.std()), "within": within},
        "positive": float(np.mean(site.samples > 0)),
        "entropy": h,
        "negentropy": entropy.OF_A_NORMAL + math.log(rough.std) - h,
        "center": site.mean,
        "width": site.std,
        "agreement": {"fitted": _agreement(found, fitted), "standard": _agreement(found, density.normal())},
        "curves": _curves(rough, found, fitted),
    }


def _agreement(found: Density, other: Density) -> dict[str, float | None]:
    low, high = found.within(1e-6)
    whole = np.linspace(low, high, _POINTS)
    return {"positive": _correlation(found, other, whole[whole > 0]), "whole": _correlation(found, other, whole)}


def _correlation(found: Density, other: Density, x: Array) -> float | None:
    if not x.size:
        return None
    weight, one, two = found.pdf(x), found.derivative(x), other.derivative(x)
    norm = math.sqrt(float(np.sum(weight * one**2)) * float(np.sum(weight * two**2)))
    return float(np.sum(weight * one * two)) / norm if norm > 0 else None


def _curves(rough: Density, found: Density, fitted: Density) -> dict[str, list[float]]:
    x = np.linspace(found.mean - 4 * found.std, found.mean + 4 * found.std, _CURVE_POINTS)
    return {
        "x": x.tolist(),
        "density": rough.pdf(x).tolist(),
        "normal": fitted.pdf(x).tolist(),
        "correction": found.derivative(x).tolist(),
        "normal_correction": fitted.derivative(x).tolist(),
    }
