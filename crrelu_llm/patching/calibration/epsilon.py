"""ε by weighted least squares, in closed form: the level `fit`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.eafo.fitted import FittedCRReLU

# Weight of the layer's ε in the fit of a channel's, as a share of an average channel's own evidence. A channel whose
# inputs stay away from 0 says nothing about its ε: it is drawn to the layer's.
_PRIOR = 1e-2


@dataclass
class EpsilonFit:
    """ε of one site, float32, `(1,)` or `(channels,)`, and errors at the MLP's product.

    Attributes:
        error: Root mean square of (new − original) over that of the original.
        naive_error: The same for the plain swap.
    """

    epsilon: Tensor | None
    error: float
    naive_error: float


class EpsilonSums:
    """Minimises Σ u²·(act(x) − relu(x) − ε·g(x))² with g(x) = x·exp(−x²/2), or with the target's centre and width.

    u is what the MLP multiplies the activation by (the up-projection of a gated MLP), and 1 in a plain one. Only sums
    per channel are kept, float64, so memory does not grow with the text.

    Args:
        target: The new activation as it starts. Where it has no ε there is nothing to fit, and only the error is told.
        num_channels: The site's width.
    """

    def __init__(self, target: nn.Module, num_channels: int):
        self.target = target
        self.start = target.epsilon.detach().double().cpu() if isinstance(target, CRReLU) else None
        # Σ w·g·g, Σ w·g·r, Σ w·r·r with r = act(x) − f(x) at ε = 0, and Σ w·act²
        self.sums = torch.zeros(4, num_channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, factor: Tensor | None) -> None:
        """Counts inputs and outputs of the original activation, each `(…, channels)`, and the other factor."""
        x, y = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        w = None if factor is None else factor.reshape(-1, factor.shape[-1]).float().square()
        if not isinstance(self.target, CRReLU):
            residual = y - self.target.to(x.device)(x)
        else:
            bump = bump_of(self.target, x)
            residual = y - x.relu()
            self.sums[0] += _sum(bump * bump, w)
            self.sums[1] += _sum(bump * residual, w)
        self.sums[2] += _sum(residual * residual, w)
        self.sums[3] += _sum(y * y, w)

    @property
    def finite(self) -> bool:
        """Whether all that was seen is."""
        return bool(self.sums.isfinite().all())

    @property
    def total(self) -> float:
        """Σ u²·act(x)²."""
        return float(self.sums[3].sum())

    def solve(self, epsilon_per: str) -> EpsilonFit:
        """The best ε: one for all channels or one a channel."""
        gg, gr, rr, yy = self.sums
        total = yy.sum()
        if self.start is None:
            error = _relative(rr.sum(), total)
            return EpsilonFit(None, error, error)
        whole = gr.sum() / gg.sum() if gg.sum() > 0 else gr.new_zeros(())
        epsilon = whole.reshape(1)
        if epsilon_per == "channel":
            prior = _PRIOR * gg.mean()
            epsilon = torch.where(gg + prior > 0, (gr + prior * whole) / (gg + prior), whole)

        def error_of(epsilon: Tensor) -> float:
            return _relative((rr - 2 * epsilon * gr + epsilon * epsilon * gg).clamp_min(0).sum(), total)

        return EpsilonFit(epsilon.float(), error_of(epsilon), error_of(self.start))


def bump_of(activation: CRReLU, x: Tensor) -> Tensor:
    """What ε is multiplied by, elementwise: `(x − μ)·exp(−(x − μ)²/2σ²)`."""
    t, width = _standardised(activation, x)
    return width * t * torch.exp(-0.5 * t * t)


def slope_of(activation: CRReLU, x: Tensor) -> Tensor:
    """The derivative of `bump_of` in `x`."""
    t, _ = _standardised(activation, x)
    return (1 - t * t) * torch.exp(-0.5 * t * t)


def _standardised(activation: CRReLU, x: Tensor) -> tuple[Tensor, Tensor | float]:
    if not isinstance(activation, FittedCRReLU):
        return x, 1.0
    width = activation.width.to(x)
    return (x - activation.center.to(x)) / width, width


def _relative(left: Tensor, total: Tensor) -> float:
    return float((left / total).sqrt()) if total > 0 else 0.0


def _sum(values: Tensor, weight: Tensor | None = None) -> Tensor:
    return (values if weight is None else values * weight).sum(0).to("cpu", torch.float64)
