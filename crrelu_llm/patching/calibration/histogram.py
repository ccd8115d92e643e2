"""The statistics that a calibration keeps of the text: a weighted histogram of the inputs of each channel."""

import torch
from torch import Tensor

_BINS = 256
_REACH = 8.0  # the outermost bins lie at sinh(8) ≈ 1490 times a typical input


class Histogram:
    """The weight of each input of an activation, per channel: all that a fit of the activation needs.

    The weight of an input is u²/(v + m). u is the factor by which the MLP multiplies the activation (the
    up-projection of a gated MLP; 1 in a plain MLP), v the token's squared product summed over the channels, and m a
    typical v. So an ordinary token counts by its squared error, and a token with massive activations (usually the
    first of a text) by its relative squared error, because the norm that follows sees no more of it. Memory does not
    grow with the text. On a CPU the same text always gives the same bits.

    Args:
        num_channels: The site's width.
    """

    def __init__(self, num_channels: int):
        self.weights = torch.zeros(num_channels, _BINS, dtype=torch.float64, device="cpu")  # of the text of the fit
        self.held_back = torch.zeros_like(self.weights)  # of the held-back text
        self.tokens = 0
        self.finite = True
        self._unit = self._typical = 0.0  # a typical input and a typical v, from the first tokens

    @property
    def points(self) -> Tensor:
        """The inputs at the centres of the bins, `(bins,)`, float64."""
        step = 2 * _REACH / _BINS
        return self._unit * ((torch.arange(_BINS, dtype=torch.float64, device="cpu") + 0.5) * step - _REACH).sinh()

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, factor: Tensor | None, held_back: bool) -> None:
        """Counts a use of the activation.

        Args:
            x: Its inputs, `(…, channels)`, floating point.
            y: Its outputs, like `x`.
            factor: u, like `x`, or None for 1.
            held_back: Whether this is held-back text.
        """
        x, y = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (x, y))
        if not x.numel():
            return
        u = None if factor is None else factor.reshape(-1, factor.shape[-1]).float()
        v = (y if u is None else y * u).square().sum(1, keepdim=True)
        if not (bool(v.isfinite().all()) and bool(x.isfinite().all())):
            self.finite = False
            return
        if not self._unit:
            self._unit, self._typical = _typical(x.abs(), 1e-6), _typical(v, 1e-30)
        weight = (
            (self._typical / (v + self._typical)).expand_as(x)
            if u is None
            else u.square() * (self._typical / (v + self._typical))
        )
        place = (x / self._unit).asinh_().add_(_REACH).mul_(_BINS / (2 * _REACH))
        cell = place.to(torch.int64).clamp_(0, _BINS - 1)
        cell += _BINS * torch.arange(x.shape[1], device=x.device)
        target = self.held_back if held_back else self.weights
        size = target.numel()
        if x.device.type == "cpu":
            found = torch.bincount(cell.flatten(), weight.flatten(), minlength=size)
        else:  # bincount is not deterministic there
            found = torch.zeros(size, device=x.device).index_put_((cell.flatten(),), weight.flatten(), accumulate=True)
        target += found.view_as(target).to("cpu", torch.float64)
        self.tokens += 0 if held_back else len(x)


def _typical(values: Tensor, least: float) -> float:
    """The median of the nonzero values: experts and sparse layers have many exact zeros."""
    values = values[values > 0]
    return max(float(values.median()), least) if values.numel() else least
