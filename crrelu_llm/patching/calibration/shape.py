"""What each channel's activation becomes, `gain·f(scale·(x + shift)) + constant`, by least squares: the level `refit`.

Scale, shift, gain and constant are no parameters of the activation: they fold into the weights around it. The gain
matters most. With gain = 1/scale the new activation equals the old one far from 0, but the inputs of pretrained MLPs
lie near 0, where relu's kink is at its worst; with a free gain, a large ε makes the kink small. A shift goes further:
it moves the kink to where inputs are rare, and leaves them to a smooth stretch of the curve.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.patching.calibration.epsilon import bump_of, slope_of

# Weight of the layer's average channel in the fit of each, as a share of an average channel's own evidence: a channel
# that is hardly ever active is drawn to what fits the others.
_PRIOR = 1e-3
# What a factor costs, as a share of the channel's energy: a step of the optimiser on a row that was scaled down moves
# the output more than before, and far shifts need outputs that cancel, so that such models train badly. And of shapes
# that are as good as each other (all scales are, for relu), the plainest is taken.
_COST_OF_SCALE = 1e-3  # × log₂(scale)²
_COST_OF_SHIFT = 1e-4  # × shift²
_COST_OF_SIZE = 1e-3  # × (what is added up, before the constant, over what comes out)²
_BINS = 1024
_REACH = 7.0  # the outermost bins are sinh(7) ≈ 548 times a typical input away
# A bump of width 1/scale; beyond these ends a CRReLU is a leaky ReLU, or a ReLU, on what activations are fed with.
SCALES = torch.logspace(-4, 1.5, 12, base=2, dtype=torch.float64)
SHIFTS = torch.linspace(-4, 4, 65, dtype=torch.float64)
# A larger ε would leave the ReLU next to nothing, and one gradient step could turn the function around.
LARGEST_EPSILON = 4.0


@dataclass
class Shape:
    """One float32 value a channel, `(channels,)`; ε is `(1,)` where it is one for the layer, None without one.

    `scale` is negative where the mirrored activation fits better.
    """

    epsilon: Tensor | None
    scale: Tensor
    shift: Tensor
    gain: Tensor
    constant: Tensor


class Histogram:
    """How often each input of an activation occurs, per channel, weighted by u²: all that a fit of its shape needs.

    u is what the MLP multiplies the activation by (the up-projection of a gated MLP), and 1 in a plain one.

    Args:
        x: The activation's inputs, `(tokens, channels)`.
        factor: u, `(tokens, channels)`, or None.
    """

    def __init__(self, x: Tensor, factor: Tensor | None):
        x = x.float().cpu()  # on the CPU, where the order of a sum is always the same
        self.unit = float(x.abs().median().clamp_min(1e-6))
        step = 2 * _REACH / _BINS
        place = ((x / self.unit).asinh() + _REACH) / step
        cell = place.long().clamp_(0, _BINS - 1) + _BINS * torch.arange(x.shape[1])
        weight = torch.ones_like(x) if factor is None else factor.float().cpu().square()
        counts = torch.bincount(cell.flatten(), weight.flatten().double(), minlength=_BINS * x.shape[1])
        self.weights = counts.view(x.shape[1], _BINS)
        middle = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * step - _REACH
        self.points = self.unit * middle.sinh()


@torch.no_grad()
def fit_shape(
    original: nn.Module,
    target: nn.Module,
    histogram: Histogram,
    epsilon_per: str,
    importance: Tensor,
    blur: Tensor | None,
    constant: bool,
) -> Shape:
    """Minimises Σ u²·(original(x) − gain·f(scale·(x + shift)) − constant)² for each channel, f with its own ε.

    Args:
        original: The old activation.
        target: The new one.
        histogram: Its inputs.
        epsilon_per: One ε for the `"layer"`, or one for each `"channel"`.
        importance: `(channels,)`: how much a channel's squared error counts, where one ε serves all.
        blur: `(channels,)`: the shift is inexact by this share, root mean square; 0 where a bias does it exactly.
            None: no shift.
        constant: Whether a constant can be added (by the bias after a plain MLP).
    """
    original, target = (copy.deepcopy(activation).cpu().double() for activation in (original, target))
    weights = histogram.weights
    weights = weights + _PRIOR * weights.mean(0)
    x = histogram.points
    best: _Best | None = None
    shifts = SHIFTS if blur is not None else torch.zeros(1, dtype=torch.float64)
    epsilon = None
    if isinstance(target, CRReLU) and epsilon_per == "layer":
        epsilon = _common_epsilon(original, target, weights, x, importance.double().cpu(), shifts, blur, constant)
    for shift in shifts:
        found = _at_shift(original, target, weights, x, shift, blur, constant, epsilon)
        best = found if best is None else best.better(found)
    assert best is not None
    shared = None if not isinstance(target, CRReLU) else best.epsilon if epsilon is None else epsilon.reshape(1)
    parts = (best.scale, best.shift, best.gain / best.scale.abs(), best.constant)
    return Shape(None if shared is None else shared.float(), *(part.float() for part in parts))


@dataclass
class _Best:
    """The best for each channel so far; `left` is its squared error beside a constant."""

    left: Tensor
    scale: Tensor
    shift: Tensor
    gain: Tensor
    epsilon: Tensor
    constant: Tensor

    def better(self, other: "_Best") -> "_Best":
        take = other.left < self.left
        return _Best(*(torch.where(take, theirs, ours) for ours, theirs in zip(_all(self), _all(other), strict=True)))


def _all(best: _Best) -> tuple[Tensor, ...]:
    return best.left, best.scale, best.shift, best.gain, best.epsilon, best.constant


def _at_shift(
    original: nn.Module,
    target: nn.Module,
    weights: Tensor,
    x: Tensor,
    shift: Tensor,
    blur: Tensor | None,
    constant: bool,
    epsilon: Tensor | None,
) -> _Best:
    """The best scale, gain, ε and constant of each channel at one shift."""
    scales = torch.cat([SCALES, -SCALES])
    sums = _Sums(original, target, weights, x, scales, shift, blur, constant)
    if epsilon is not None or not isinstance(target, CRReLU):
        given = torch.zeros((), dtype=torch.float64) if epsilon is None else epsilon
        gain, left = sums.gain(given)
        epsilons = given.expand_as(gain)
    else:
        gain, epsilons, left = sums.gain_and_epsilon()
    left = sums.cost(left)
    row = left.argmin(0)
    channels = torch.arange(left.shape[1])
    gain, epsilons = gain[row, channels], epsilons[row, channels]
    return _Best(
        left[row, channels],
        scales[row],
        shift.expand_as(gain),
        gain,
        epsilons,
        sums.constant(row, gain, epsilons),
    )


class _Sums:
    """Moments of f(scale·(x + shift))/|scale| = R + ε·B and of the original's output, each `(scales, channels)`."""

    def __init__(
        self,
        original: nn.Module,
        target: nn.Module,
        weights: Tensor,
        x: Tensor,
        scales: Tensor,
        shift: Tensor,
        blur: Tensor | None,
        constant: bool,
    ):
        y = original(x)
        t = scales[:, None] * (x + shift)
        size = scales.abs()[:, None]
        if isinstance(target, CRReLU):
            r, b = t.relu() / size, bump_of(target, t) / size
            slope_r, slope_b = (t > 0).double(), slope_of(target, t)
        else:
            r = target(t) / size
            b = slope_b = torch.zeros_like(r)
            slope_r = torch.gradient(r, spacing=(x,), dim=1)[0]
        columns = torch.stack([r * r, r * b, b * b, r * y, b * y, r, b])
        self.rr, self.rb, self.bb, self.ry, self.by, self.r, self.b = columns @ weights.T
        self.one = weights.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        self.y = weights @ y
        self.centred = constant
        energy = weights @ (y * y)
        self.costs = energy * (_COST_OF_SCALE * size.log2().square() + _COST_OF_SHIFT * shift * shift)
        amplitude = [_COST_OF_SIZE * part for part in (self.rr, self.rb, self.bb)]
        if constant:
            mean_r, mean_b = self.r / self.one, self.b / self.one
            self.rr, self.rb, self.bb = self.rr - mean_r * self.r, self.rb - mean_r * self.b, self.bb - mean_b * self.b
            self.ry, self.by = self.ry - mean_r * self.y, self.by - mean_b * self.y
        self.rr, self.rb, self.bb = (
            own + extra for own, extra in zip((self.rr, self.rb, self.bb), amplitude, strict=True)
        )
        if blur is not None:
            noise = (shift * blur.double().cpu()).square()
            slopes = torch.stack([slope_r * slope_r, slope_r * slope_b, slope_b * slope_b]) @ weights.T
            self.rr, self.rb, self.bb = (
                own + noise * extra for own, extra in zip((self.rr, self.rb, self.bb), slopes, strict=True)
            )

    def gain(self, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """The best gain with a given ε, and the squared error beside a constant."""
        size = self.rr + 2 * epsilon * self.rb + epsilon * epsilon * self.bb
        match = self.ry + epsilon * self.by
        gain = torch.where(size > 1e-12 * self.one, match / size, 0.0)
        return gain, -gain * match

    def gain_and_epsilon(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best gain and ε, |ε| bounded, and the squared error beside a constant."""
        free = (self.by * self.rr - self.ry * self.rb) / (self.ry * self.bb - self.by * self.rb)
        ends = torch.full_like(free, LARGEST_EPSILON)
        inside = torch.where(free.abs() <= LARGEST_EPSILON, free, 0.0)  # also for 0/0
        found = [(*self.gain(epsilon), epsilon) for epsilon in (inside, ends, -ends)]
        gains, lefts, epsilons = (torch.stack(parts) for parts in zip(*found, strict=True))
        best = lefts.argmin(0, keepdim=True)
        gain, left, epsilon = (parts.gather(0, best)[0] for parts in (gains, lefts, epsilons))
        return gain, epsilon, left

    def cost(self, left: Tensor) -> Tensor:
        """The squared error and what the factors cost, beside a constant."""
        return left + self.costs

    def constant(self, row: Tensor, gain: Tensor, epsilon: Tensor) -> Tensor:
        """What is left on average, for the chosen scale of each channel."""
        if not self.centred:
            return torch.zeros_like(gain)
        channels = torch.arange(len(row))
        return (self.y - gain * (self.r[row, channels] + epsilon * self.b[row, channels])) / self.one


def _common_epsilon(
    original: nn.Module,
    target: nn.Module,
    weights: Tensor,
    x: Tensor,
    importance: Tensor,
    shifts: Tensor,
    blur: Tensor | None,
    constant: bool,
) -> Tensor:
    """One ε, where each channel takes the scale, shift and gain that suit it: the best of a grid, refined twice."""
    scales = torch.cat([SCALES, -SCALES])
    coarse = shifts[::4] if len(shifts) > 1 else shifts
    sums = [_Sums(original, target, weights, x, scales, shift, blur, constant) for shift in coarse]
    step = LARGEST_EPSILON / 16
    candidates = torch.linspace(-LARGEST_EPSILON, LARGEST_EPSILON, 33, dtype=torch.float64)
    for _ in range(3):
        losses = []
        for epsilon in candidates:
            lefts = torch.stack([entry.cost(entry.gain(epsilon)[1]).amin(0) for entry in sums]).amin(0)
            losses.append((lefts * importance).sum())
        best = candidates[int(torch.stack(losses).argmin())]
        candidates = best + torch.linspace(-step, step, 9, dtype=torch.float64)
        step /= 4
    return best
