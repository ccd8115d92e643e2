"""The centre and width of a site's CRReLU: the mean and standard deviation of its pre-activations."""

import math

import torch
from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tasks import not_finite
from crrelu_llm.patching.calibration.walk import Walk
from crrelu_llm.patching.sites import Site

_ROUNDING = torch.finfo(torch.float32)


class Moments:
    """Count, mean and sum of squared deviations, float64, updated batch by batch (Chan's formula)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, 0.0, 0.0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Counts every entry of `x`, any shape, floating point."""
        if not x.numel():
            return
        wide = x.detach().double()
        mean = wide.mean()
        count, found = x.numel(), float(mean)
        square = float((wide - mean).square().sum())
        total = self.count + count
        self.square += square + (found - self.mean) ** 2 * self.count * count / total
        self.mean += (found - self.mean) * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation."""
        return (self.square / self.count) ** 0.5 if self.count else 0.0


@torch.no_grad()
def set_moments(model: nn.Module, walk: Walk, sites: list[Site], activations: dict[str, nn.Module]) -> None:
    """Runs the current layer once, and sets the centre and width of its new activations.

    A site that no token reaches keeps the standard density.

    Args:
        model: The model, with its original activations in this layer.
        walk: At the layer.
        sites: The layer's sites.
        activations: The new activations, by path.

    Raises:
        InputError: Pre-activations are not finite, or all the same up to rounding: there is no density to fit.
    """
    moments = {site.path: Moments() for site in sites}

    def seen(path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
        moments[path].add(x)

    if sites:
        with tapped(model, sites, seen):
            walk.run()
    for site in sites:
        found, activation = moments[site.path], activations[site.path]
        if not found.count:
            continue
        if not math.isfinite(found.std):
            raise not_finite(site)
        # A smaller deviation is the rounding error of a constant, or is 0 in float32.
        least = max(_ROUNDING.eps * abs(found.mean), _ROUNDING.tiny)
        if found.std <= least:
            raise InputError(
                f"{site.path}: its pre-activations on the calibration text have mean {found.mean:g} and standard "
                f"deviation {found.std:g}: there is no density to fit; use density: standard, or other text"
            )
        assert isinstance(activation, FittedCRReLU)
        activation.center.fill_(found.mean)
        activation.width.fill_(found.std)
