"""The smooth density of a site's pre-activations, tabulated, because it is asked for at many points many times."""

from dataclasses import replace

import numpy as np

from crrelu_llm.eafo import density
from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.models.preactivations import Preactivations

# The body of a density has details of a bandwidth, about a tenth of a deviation; far out there is little to see.
_BODY, _BODY_POINTS, _TAIL_POINTS = 8.0, 4001, 1001


def smooth(site: Preactivations) -> Density:
    """The kernel estimate of a site's density: cubic splines through its values and slopes.

    Raises:
        InputError: Too few samples, or samples that do not vary.
    """
    from scipy.interpolate import CubicHermiteSpline

    found = density.from_samples(site.samples, name=site.path)
    low, high = found.within()
    body = (max(low, found.mean - _BODY * found.std), min(high, found.mean + _BODY * found.std))
    points = np.unique(np.concatenate([np.linspace(low, high, _TAIL_POINTS), np.linspace(*body, _BODY_POINTS)]))
    table = CubicHermiteSpline(points, found.pdf(points), found.derivative(points))
    slope = table.derivative()

    def pdf(x: Array) -> Array:
        return np.where((x >= low) & (x <= high), np.maximum(table(np.clip(x, low, high)), 0.0), 0.0)

    def derivative(x: Array) -> Array:
        return np.where((x >= low) & (x <= high), slope(np.clip(x, low, high)), 0.0)

    return replace(found, _pdf=pdf, _derivative=derivative)
