"""Fits ε and the numbers of a calibrated activation, `gain·f(scale·(x + shift)) + offset`, by weighted least squares.

The model is a sum of known curves of t = scale·(x + shift), each with a factor, and a constant, the offset. CRReLU has
two curves, relu(t) with the factor gain and the bump t·exp(−t²/2) with the factor gain·ε; other activations have f(t)
alone. For a given scale and shift the factors have a closed form. So a grid of scales and shifts gives the start, and
a few Levenberg–Marquardt steps in all numbers give the result.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.patching.calibration.histogram import Histogram

Curve = Callable[[Tensor], Tensor]

# Weight of the layer's average channel in the fit of each channel, as a share of an average channel's own weight: a
# channel that is hardly ever active is drawn towards the fit of the others.
_OF_THE_LAYER = 5e-3
# Weight of inputs that never occurred, as a share of the channel's own: as if four more tokens had been seen. Its
# density is a Cauchy distribution around the observed inputs. It bounds the fit beyond the range of the text.
_UNSEEN_TOKENS = 4.0
_BEYOND = 2.0  # where that distribution ends, as a multiple of the channel's own range about its mean
_MOST_UNSEEN = 0.03  # upper bound of that weight, reached with few tokens
# With a larger ε the ReLU part would be next to nothing, and a gradient step could flip the sign of the function.
LARGEST_EPSILON = 8.0
# At scales around these, CRReLU's bump is as wide as the bend of a smooth activation; at larger ones it is a ReLU.
_SCALES = torch.logspace(-3.5, 1.0, 10, base=2, dtype=torch.float64)
_SHIFTS = torch.linspace(-4.0, 4.0, 17, dtype=torch.float64)
_EPSILONS = torch.linspace(-2.0, 6.0, 33, dtype=torch.float64)  # candidates for one ε that serves all channels
_STEPS = 12
_SAMPLE = 192  # channels on which the layer's ε is chosen
_CHANNELS = 4096  # fitted at once: bounds the memory
_TINY = 1e-30
_SMALL = 1 << 13


@dataclass
class Parameters:
    """The numbers of a calibrated activation, float32: ε `(1,)`, `(channels,)` or None; the others `(channels,)`."""

    epsilon: Tensor | None
    scale: Tensor
    shift: Tensor
    gain: Tensor
    offset: Tensor

    @torch.no_grad()
    def write(self, activation: nn.Module) -> None:
        """Writes the numbers into a calibrated activation."""
        for name in ("scale", "shift", "gain", "offset", "epsilon"):
            value = getattr(self, name)
            if value is not None:
                getattr(activation, name).copy_(value)


def fit(original: nn.Module, target: nn.Module, histogram: Histogram, epsilon_per: str) -> Parameters:
    """Minimises Σ w(x)·(original(x) − gain·f(scale·(x + shift)) − offset)² for each channel.

    Args:
        original: The old activation, elementwise or per channel.
        target: The new activation without the four: CRReLU, whose ε is fitted too, or any elementwise activation.
        histogram: The inputs and their weights w.
        epsilon_per: One ε per `"layer"`, or one per `"channel"`.
    """
    original, target = (copy.deepcopy(activation).cpu().double().eval() for activation in (original, target))
    with _one_thread():
        return _fit(original, target, histogram, epsilon_per)


def _fit(original: nn.Module, target: nn.Module, histogram: Histogram, epsilon_per: str) -> Parameters:
    x = histogram.points
    weights = _with_priors(histogram, x)
    counted = weights.sum(0) > 0
    x, weights = x[counted], weights[:, counted]
    y = _of_each_channel(original, x, len(weights))
    if not isinstance(target, CRReLU):
        return _of_channels([lambda t: target(t.double()).to(t.dtype)], weights, x, y)
    relu, bump = _parts(target)
    if epsilon_per == "channel":
        return _of_channels([relu, bump], weights, x, y)
    # Channels are weighted by their effect on the output, as in `relative_error`.
    counts = histogram.weights.sum(1, keepdim=True)
    epsilon = _common_epsilon(relu, bump, weights * counts if float(counts.sum()) > 0 else weights, x, y)
    found = _of_channels([lambda t: relu(t) + epsilon * bump(t)], weights, x, y)
    found.epsilon = torch.tensor([epsilon], dtype=torch.float32)
    return found


@torch.no_grad()
def relative_error(original: nn.Module, activation: nn.Module, histogram: Histogram) -> float:
    """Weighted root mean square of (activation − original), over the original's, on the held-back text.

    Without held-back text, the error on the text of the fit.

    Args:
        original: The old activation.
        activation: The new activation, calibrated or not; maps `(…, channels)` to the same shape.
        histogram: The inputs and their weights.
    """
    weights = histogram.held_back if float(histogram.held_back.sum()) > 0 else histogram.weights
    x = histogram.points
    y = _of_each_channel(copy.deepcopy(original).cpu().double(), x, len(weights))
    values = _of_each_channel(copy.deepcopy(activation).cpu(), x.float(), len(weights)).double()
    total = float((weights * y * y).sum())
    return math.sqrt(float((weights * (values - y) ** 2).sum()) / total) if total > 0 else 0.0


@torch.no_grad()
def _of_each_channel(activation: nn.Module, x: Tensor, channels: int) -> Tensor:
    """The outputs of an activation on the same inputs in each channel, `(channels, inputs)`."""
    inputs = x[:, None].expand(-1, channels)
    # In parts small enough for the plain formula: nothing is compiled for this.
    return torch.cat([activation(part) for part in inputs.split(max(1, _SMALL // channels))]).T


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A context with one thread: for many small operations as fast as two, and ten times as fast on a busy CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_priors(histogram: Histogram, x: Tensor) -> Tensor:
    """The weights, plus a small prior from the layer's other channels and from unseen inputs: about 1 per channel."""
    weights = histogram.weights
    seen, total = weights > 0, weights.sum(1, keepdim=True)
    of_the_layer = (weights / total.clamp_min(_TINY)).mean(0)
    weights = weights + _OF_THE_LAYER * total.mean() * of_the_layer
    total = weights.sum(1, keepdim=True).clamp_min(_TINY)
    mean = (weights @ x)[:, None] / total
    deviation = ((weights @ (x * x))[:, None] / total - mean * mean).clamp_min(0).sqrt()
    low, high = (torch.where(seen, x, mean).amin(1, keepdim=True), torch.where(seen, x, mean).amax(1, keepdim=True))
    inside = (x - mean >= _BEYOND * (low - mean)) & (x - mean <= _BEYOND * (high - mean))
    cauchy = torch.gradient(x)[0] * inside / (1 + ((x - mean) / (deviation + _TINY)).square())
    unseen = min(_UNSEEN_TOKENS / max(histogram.tokens, 1), _MOST_UNSEEN)
    return weights / total + unseen * cauchy / cauchy.sum(1, keepdim=True).clamp_min(_TINY)


def _parts(target: CRReLU) -> tuple[Curve, Curve]:
    """The ReLU part of a CRReLU, and the bump that is multiplied by ε."""
    if isinstance(target, FittedCRReLU):
        center, width = float(target.center), float(target.width)
    else:
        center, width = 0.0, 1.0

    def bump(t: Tensor) -> Tensor:
        v = (t - center) / width
        return width * v * torch.exp(-0.5 * v * v)

    return torch.relu, bump


def _of_channels(curves: Sequence[Curve], weights: Tensor, x: Tensor, y: Tensor) -> Parameters:
    """The best numbers of each channel; with two curves, ε is the second factor divided by the first."""
    parts = []
    for some, values in zip(weights.split(_CHANNELS), y.split(_CHANNELS), strict=True):
        both = []
        for sign in (1, -1):  # each sign has its own minimum
            scale, shift = _start(curves, some, x, values, sign * _SCALES)
            both.append(_refine(curves, some.float(), x.float(), values.float(), scale.float(), shift.float()))
        (numbers, loss), (others, other_loss) = both
        better = other_loss < loss
        parts.append(torch.where(better[:, None], others, numbers))
    numbers = torch.cat(parts)
    scale, shift, offset, gain = numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3]
    epsilon = None if len(curves) == 1 else torch.where(gain == 0, 0.0, numbers[:, 4] / gain)
    return Parameters(epsilon, scale, shift, gain, offset)


@torch.no_grad()
def _start(curves: Sequence[Curve], weights: Tensor, x: Tensor, y: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The shift, and the scale among `scales`, with the least error of each channel, `(channels,)` each."""
    best = torch.full((len(weights),), math.inf, dtype=torch.float64)
    scale, shift = torch.ones_like(best), torch.zeros_like(best)
    weighted = weights * y
    for candidate in _SHIFTS:
        left = _Moments(curves, weights, weighted, x, scales, candidate).left()
        least, row = left.min(0)
        better = least < best
        best = torch.where(better, least, best)
        scale = torch.where(better, scales[row], scale)
        shift = torch.where(better, candidate, shift)
    return scale, shift


class _Moments:
    """Weighted moments of the curves and of the original's output at one shift, each `(scales, channels)`.

    `weighted` is the original's output times its weights.
    """

    def __init__(
        self, curves: Sequence[Curve], weights: Tensor, weighted: Tensor, x: Tensor, scales: Tensor, shift: Tensor
    ) -> None:
        t = scales[:, None] * (x + shift)
        values = [curve(t) for curve in curves]
        pairs = [(i, j) for i in range(len(values)) for j in range(i, len(values))]
        columns = [values[i] * values[j] for i, j in pairs] + values
        sums = (torch.stack(columns) @ weights.T).unbind()
        matches = (torch.stack(values) @ weighted.T).unbind()
        one, mean = weights.sum(1), weighted.sum(1)
        means = sums[len(pairs) :]
        # beside a constant
        self.gram = {
            pair: found - means[pair[0]] * means[pair[1]] / one for pair, found in zip(pairs, sums, strict=False)
        }
        self.match = [found - own * mean / one for found, own in zip(matches, means, strict=True)]

    def left(self) -> Tensor:
        """The squared error with the best factors, up to a constant."""
        aa = self.gram[0, 0] * (1 + 1e-6) + _TINY
        if len(self.match) == 1:
            return -self.match[0].square() / aa
        return self._of_two(self.gram[1, 1] * (1 + 1e-6) + _TINY, aa)

    def _of_two(self, bb: Tensor, aa: Tensor) -> Tensor:
        ab, ay, by = self.gram[0, 1], self.match[0], self.match[1]
        determinant = (aa * bb - ab * ab).clamp_min(_TINY)
        first, second = (ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant
        # Where the best ε exceeds its bound: the better end of its range, or the first factor alone.
        bounded = -ay * ay / aa
        for bound in (LARGEST_EPSILON, -LARGEST_EPSILON):
            size = aa + 2 * bound * ab + bound * bound * bb
            bounded = torch.minimum(bounded, -(ay + bound * by).square() / size)
        return torch.where(second.abs() > LARGEST_EPSILON * first.abs(), bounded, -(first * ay + second * by))

    def with_epsilon(self, epsilon: float) -> Tensor:
        """The squared error with this ε and the best gain, up to a constant."""
        size = self.gram[0, 0] + 2 * epsilon * self.gram[0, 1] + epsilon * epsilon * self.gram[1, 1]
        return -(self.match[0] + epsilon * self.match[1]).square() / (size * (1 + 1e-6) + _TINY)


@torch.no_grad()
def _common_epsilon(relu: Curve, bump: Curve, weights: Tensor, x: Tensor, y: Tensor) -> float:
    """One ε for all channels, each with its own best scale, shift, gain and offset: the best of a grid, refined."""
    every = max(1, len(weights) // _SAMPLE)
    some, y = weights[::every], y[::every]
    some = some / some.sum().clamp_min(_TINY)  # normalised: the terms that keep divisions finite are small beside 1
    scales = torch.cat([_SCALES, -_SCALES])
    weighted = some * y
    moments = [_Moments([relu, bump], some, weighted, x, scales, shift) for shift in _SHIFTS]
    own = (weighted * y).sum(1)

    def start(epsilon: float) -> tuple[float, Tensor, Tensor]:
        """The least loss on the grid, with its scale and shift."""
        left = torch.stack([entry.with_epsilon(epsilon) for entry in moments]).flatten(0, 1)
        least, place = left.min(0)
        return float(least.sum()), scales[place % len(scales)], _SHIFTS[place // len(scales)]

    def loss(epsilon: float) -> float:
        curve = lambda t: relu(t) + epsilon * bump(t)  # noqa: E731
        _, scale, shift = start(epsilon)
        numbers = (part.float() for part in (some, x, y, scale, shift))
        return float((_refine([curve], *numbers)[1].double() * own).sum())

    best = min(_EPSILONS.tolist(), key=lambda epsilon: start(epsilon)[0])
    step = float(_EPSILONS[1] - _EPSILONS[0])
    known = {epsilon: loss(epsilon) for epsilon in (best - step, best, best + step)}
    for _ in range(3):
        best = min(known, key=known.__getitem__)
        below, middle, above = (known.get(best + offset) for offset in (-step, 0.0, step))
        if below is None or above is None:
            known[best - step if below is None else best + step] = loss(best - step if below is None else best + step)
            continue
        assert middle is not None
        curvature = below - 2 * middle + above  # the bottom of a parabola
        lowest = best + (0.5 * step * (below - above) / curvature if curvature > 0 else 0.0)
        known[lowest] = loss(lowest)
        break
    return min(known, key=known.__getitem__)


def _refine(
    curves: Sequence[Curve], weights: Tensor, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Levenberg–Marquardt steps from a start, each channel on its own.

    Returns:
        Scale, shift, offset and the curves' factors, `(channels, 3 + curves)`; and the squared error relative to the
        channel's own mean square, `(channels,)`.
    """
    weights = weights / weights.sum(1, keepdim=True).clamp_min(_TINY)
    sign, logarithm = scale.sign(), scale.abs().log()
    own = (weights * y * y).sum(1).clamp_min(_TINY)

    def at(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error, Gauss–Newton matrix and gradient."""
        factor = sign * numbers[:, 0].exp()
        t = factor[:, None] * (x + numbers[:, 1:2])
        values, slopes = zip(*(_value_and_slope(curve, t) for curve in curves), strict=True)
        residual, slope = y - numbers[:, 2:3], torch.zeros_like(t)
        for index, (value, its_slope) in enumerate(zip(values, slopes, strict=True)):
            amount = numbers[:, 3 + index, None]
            residual = residual - amount * value
            slope = slope + amount * its_slope
        columns = torch.stack([slope * t, slope * factor[:, None], torch.ones_like(t), *values], 1)
        weighted = columns * weights[:, None]
        error = (weights * residual * residual).sum(1)
        return error, weighted @ columns.mT, (weighted @ residual[..., None])[..., 0]

    # First the factors, in closed form.
    numbers = torch.zeros(len(weights), 3 + len(curves), dtype=weights.dtype, device=weights.device)
    numbers[:, 0], numbers[:, 1] = logarithm, shift
    _, matrix, gradient = at(numbers)
    numbers[:, 2:] = _solve(matrix[:, 2:, 2:], gradient[:, 2:], 1e-6)
    numbers = _bounded(numbers)
    damping = torch.full((len(weights),), 1e-2, dtype=weights.dtype, device=weights.device)
    error, matrix, gradient = at(numbers)
    for _ in range(_STEPS):
        step = _solve(matrix, gradient, damping)
        step[:, 0].clamp_(-0.5, 0.5)
        step[:, 1].clamp_(-1.0, 1.0)
        proposed = _bounded(numbers + step)
        found = at(proposed)
        better = found[0] < error
        numbers = torch.where(better[:, None], proposed, numbers)
        error = torch.where(better, found[0], error)
        matrix = torch.where(better[:, None, None], found[1], matrix)
        gradient = torch.where(better[:, None], found[2], gradient)
        damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-9, 1e9)
    return torch.cat([(sign * numbers[:, 0].exp())[:, None], numbers[:, 1:]], 1), error / own


def _bounded(numbers: Tensor) -> Tensor:
    if numbers.shape[1] == 5:
        bound = LARGEST_EPSILON * numbers[:, 3].abs()
        numbers = torch.cat([numbers[:, :4], numbers[:, 4].clamp(-bound, bound)[:, None]], 1)
    return numbers


def _solve(matrix: Tensor, gradient: Tensor, damping: Tensor | float) -> Tensor:
    # In float64: scale and gain of a ReLU are redundant, and in float32 the damping on the diagonal would be lost.
    wide = matrix.double()
    diagonal = wide.diagonal(dim1=1, dim2=2)
    relative = damping if isinstance(damping, float) else damping.double()[:, None]
    extra = relative * diagonal + 1e-8 * diagonal.mean(1, keepdim=True) + _TINY
    step, failed = torch.linalg.solve_ex(wide + torch.diag_embed(extra), gradient.double()[..., None])
    return torch.where((failed == 0)[:, None], step[..., 0], 0.0).nan_to_num(0.0, 0.0, 0.0).to(gradient.dtype)


def _value_and_slope(curve: Curve, t: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        value = curve(t)
        (slope,) = torch.autograd.grad(value.sum(), t)
    return value.detach(), slope
