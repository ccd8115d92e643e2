"""What a calibration keeps of the text: for each channel of a site, which inputs occur, and how much each counts."""

import torch
from torch import Tensor

_BINS = 256
_REACH = 8.0  # the outermost bins are sinh(8) ≈ 1490 times a typical input away


class Histogram:
    """How much each input of an activation counts, per channel: all that a fit of the activation needs.

    An input counts u²/(v + m): u is what the MLP multiplies the activation by (the up-projection of a gated MLP; 1 in
    a plain one), v the square of the token's whole product, summed over the channels, and m a typical v. So an
    ordinary token counts by the square of the error that it would suffer, and one of massive activations (the first
    of a text, as a rule) by the relative one: what follows, a norm, sees no more of it. Memory does not grow with the
    text. On a CPU the same text always gives the same bits.

    Args:
        num_channels: The site's width.
    """

    def __init__(self, num_channels: int):
        self.weights = torch.zeros(
            num_channels, _BINS, dtype=torch.float64, device="cpu"
        )  # of the text that is fitted to
        self.held_back = torch.zeros_like(self.weights)  # of the text that judges
        self.tokens = 0
        self.finite = True
        self._unit = self._typical = 0.0  # a typical input and a typical v: those of the first tokens

    @property
    def points(self) -> Tensor:
        """The inputs in the middle of the bins, `(bins,)`, float64."""
        step = 2 * _REACH / _BINS
        return self._unit * ((torch.arange(_BINS, dtype=torch.float64, device="cpu") + 0.5) * step - _REACH).sinh()

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, factor: Tensor | None, held_back: bool) -> None:
        """Counts a use of the activation.

        Args:
            x: Its inputs, `(…, channels)`, floating point.
            y: Its outputs, like `x`.
            factor: u, like `x`, or None for 1.
            held_back: Whether this is text to judge by.
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
        else:  # bincount adds up in an order of its own there
            found = torch.zeros(size, device=x.device).index_put_((cell.flatten(),), weight.flatten(), accumulate=True)
        target += found.view_as(target).to("cpu", torch.float64)
        self.tokens += 0 if held_back else len(x)


def _typical(values: Tensor, least: float) -> float:
    """The median of what is not 0: experts and sparse layers have many exact zeros."""
    values = values[values > 0]
    return max(float(values.median()), least) if values.numel() else least
