"""The calibration of one site: observes its inputs, and sets the numbers of its new activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crrelu_llm.activation import AffineModule, Calibrated, CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration import parameters
from crrelu_llm.patching.calibration.histogram import Histogram
from crrelu_llm.patching.calibration.records import Record
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.sites import Site

_UNSEEN = "no calibration token came here"
_NO_BETTER = "fit was no better on held-back tokens"
_ROUNDING = 1e-6  # the error between two equal functions computed in float32


class SiteTask:
    """Fits the new activation of one site to the old one.

    Args:
        site: The site.
        original: The old activation.
        activation: The new activation at its start values; `solve` sets its numbers.
    """

    def __init__(self, site: Site, original: nn.Module, activation: nn.Module):
        self.site, self.original, self.activation = site, original, activation
        self.histogram = Histogram(site.num_channels)

    def seen(self, x: Tensor, y: Tensor, factor: Tensor | None, held_back: bool) -> None:
        """Counts a use of the original activation: see `Histogram.add`."""
        self.histogram.add(x, y, factor, held_back)

    @torch.no_grad()
    def solve(self, config: PatchConfig) -> Record:
        """Sets the numbers, unless the start values have a smaller error on held-back text.

        Raises:
            InputError: Inputs or outputs are not finite.
        """
        if not self.histogram.finite:
            raise not_finite(self.site)
        if not self.histogram.tokens:
            return Record("none", 0.0, 0.0, note=_UNSEEN)
        naive = parameters.relative_error(self.original, self.activation, self.histogram)
        if config.calibration == "none":
            return Record("none", naive, naive)
        if naive < _ROUNDING:  # the same function: nothing to fit
            return Record("none", 0.0, 0.0)
        assert isinstance(self.activation, AffineModule)
        target = self.activation.activation if isinstance(self.activation, Calibrated) else self.activation
        found = parameters.fit(self.original, target, self.histogram, config.epsilon_per)
        found.write(self.activation)
        error = parameters.relative_error(self.original, self.activation, self.histogram)
        if not error < naive:
            reset(self.activation)
            return Record("none", naive, naive, note=_NO_BETTER)
        return Record("fit", error, naive, scale_mean=float(found.scale.abs().mean()))


def reset(activation: AffineModule) -> None:
    """Sets ε and the four to their start values."""
    own = ["epsilon"] if isinstance(activation, CRReLU) else []
    activation.reset_parameters([*own, "scale", "shift", "gain", "offset"])


def not_finite(site: Site) -> InputError:
    """The error for a site with infinite or NaN values."""
    return InputError(
        f"{site.path}: its inputs or outputs on the calibration text are not finite: the checkpoint is broken there, "
        "or needs a wider dtype"
    )
