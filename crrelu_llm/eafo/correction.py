"""The first-order correction of an activation for a density: the direction that lowers the entropy of its output.

Inverse form, for the inverse y of f: η(x) = −[p(y)·y″/y′ + p′(y)·y′]; moving y to y + εη changes the entropy by
−ε∫η² dx. Forward form, for f itself: c(t) = p′(t) − p(t)·f″(t)/f′(t); f + ε·c has the inverse y + εη + O(ε²).
README.md beside this file derives both.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from crrelu_llm.eafo.activations import Activation
from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.entropy import branches_of, integral, inverse_on, probe, range_on
from crrelu_llm.eafo.formulas import Formula, Shorthand, formula, latex_or_none
from crrelu_llm.errors import InputError

# An activation counts as flat below this share of its largest slope: f″/f′ would be rounding error.
_FLAT = 1e-12
_UNBOUNDED = 1e6
# Tail probabilities left out of integrals; an integral that depends strongly on this choice does not exist.
_TAIL, _INNER_TAIL = 1e-12, 1e-5
# Step of the finite differences of the correction, in standard deviations of the density.
_STEP = 1e-5


@dataclass(frozen=True)
class Excluded:
    """An interval of pre-activations, or a point (low == high), where the theory does not apply, and the reason."""

    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Correction:
    """The correction of an activation for a density.

    Attributes:
        excluded: Where the theory does not apply, in order.
    """

    activation: Activation
    density: Density
    excluded: tuple[Excluded, ...]

    def forward(self, t: Any) -> Array:
        """c(t) = p′(t) − p(t)·f″(t)/f′(t), float64; NaN where f′ = 0."""
        t = np.asarray(t, dtype=np.float64)
        slope, bend = self.activation._derivatives(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            result = self.density.derivative(t) - self.density.pdf(t) * bend / slope
        return np.where(slope == 0, np.nan, result)

    def extended(self, t: Any) -> Array:
        """c(t) where f′ ≠ 0, and p′(t) where f is flat: relu's correction extended to the whole line.

        The theory does not give this extension: it is the step from relu's correction to CRReLU.
        """
        forward = self.forward(t)
        return np.where(np.isnan(forward), self.density.derivative(t), forward)

    def inverse(self, x: Any) -> Array:
        """η(x) = −c(y)/f′(y) at y = f⁻¹(x), float64; NaN unless exactly one pre-activation maps to x."""
        x = np.asarray(x, dtype=np.float64)
        branches, _ = branches_of(self.activation, self.density)
        result, count = np.full(x.shape, np.nan), np.zeros(x.shape, dtype=int)
        for branch in branches:
            low, high = range_on(self.activation, branch)
            inside = (x > low) & (x < high)
            t = inverse_on(self.activation, branch, np.where(inside, x, (low + high) / 2))
            with np.errstate(divide="ignore", invalid="ignore"):
                eta = -self.forward(t) / self.activation.derivative(t)
            result, count = np.where(inside, eta, result), count + inside
        return np.where(count == 1, result, np.nan)

    def applies(self, t: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the theory applies at t: t is outside every excluded interval, and p(t) > 0."""
        t = np.asarray(t, dtype=np.float64)
        ok = self.density.pdf(t) > 0
        for stretch in self.excluded:
            if stretch.low < stretch.high:
                ok &= (t <= stretch.low) | (t >= stretch.high)
        return ok

    def rate(self) -> float:
        """−∫c²/f′ dt over the range where the theory applies: dH/dε at ε = 0 with fixed boundary values, in nats.

        Where f rises the rate is −∫η² dx; where f falls, −c is the direction that lowers the entropy. `boundary_rate`
        is the contribution of moving boundary values. The rate is ±∞ if the integral does not exist, which shows in a
        large contribution of the tails of the density.
        """
        whole, inner = self._rate_within(_TAIL), self._rate_within(_INNER_TAIL)
        exists = abs(whole) < _UNBOUNDED and abs(whole - inner) <= 0.02 * abs(inner) + 1e-9
        return whole if exists else float(np.copysign(np.inf, whole))

    def _rate_within(self, tail: float) -> float:
        total = 0.0
        for a, b in self._stretches(tail):
            total -= integral(lambda t: self.forward(t) ** 2 / self.activation.derivative(t), np.array([a, b]))
        return total

    def boundary_rate(self) -> float:
        """The boundary term that the theory leaves out: p·c/f′ at the ends of the intervals where it applies, in nats.

        The sum with `rate` is the change ∫p·c′/f′ dt of E log|f′|, and so of the entropy as long as f + ε·c takes no
        value twice. Where c jumps downwards at a kink, f + ε·c overlaps itself, which lowers the entropy further.
        """
        total = 0.0
        for a, b in self._stretches():
            inner = 1e-9 * (b - a)
            ends = np.array([a + inner, b - inner])
            at_ends = self.density.pdf(ends) * self.forward(ends) / self.activation.derivative(ends)
            total += float(at_ends[1] - at_ends[0])
        return total if abs(total) < _UNBOUNDED else float(np.copysign(np.inf, total))

    def _stretches(self, tail: float = _TAIL) -> list[tuple[float, float]]:
        """The intervals where the theory applies, split at the kinks."""
        low, high = self.density.within(tail)
        ends = (end for entry in self.excluded for end in (entry.low, entry.high))
        points = np.unique([low, *(end for end in ends if low < end < high), high])
        return [(a, b) for a, b in pairwise(points.tolist()) if self.applies((a + b) / 2)]

    @cached_property
    def formulas(self) -> tuple[Formula, ...]:
        """The correction in closed form, a `Formula` between kinks; empty if f or p has no formula."""
        import sympy

        t = sympy.Symbol("t", real=True)
        p = self.density.expression(t)
        if p is None or self.activation.pieces is None:
            return ()
        short = Shorthand()
        return tuple(formula(low, high, f, p, t, short) for low, high, f in self.activation.pieces(t))

    @property
    def latex(self) -> str:
        """The forward form in LaTeX; empty if there is no formula."""
        import sympy

        lines = [
            rf"{latex_or_none(found.forward)} & {sympy.latex(found.low)} < t < {sympy.latex(found.high)}"
            for found in self.formulas
        ]
        if not lines:
            return ""
        return r"c(t) = \begin{cases} " + r" \\ ".join(lines) + r" \end{cases}"


@dataclass(frozen=True)
class Corrected:
    """An activation moved along its correction, f + ε·c; made by `corrected`."""

    correction: Correction
    epsilon: float

    @property
    def name(self) -> str:
        """The name in messages and plots."""
        return f"{self.correction.activation.name} + {self.epsilon:g}·c"

    @property
    def kinks(self) -> tuple[float, ...]:
        """The kinks of the activation and of the density."""
        return (*self.correction.activation.kinks, *self.correction.density.kinks)

    def value(self, x: Any) -> Array:
        """f(x) + ε·c(x)."""
        return self.correction.activation.value(x) + self.epsilon * self.correction.extended(x)

    def derivative(self, x: Any) -> Array:
        """f′(x) + ε·c′(x), c′ by central differences."""
        x, step = np.asarray(x, dtype=np.float64), _STEP * self.correction.density.spread
        bend = (self.correction.extended(x + step) - self.correction.extended(x - step)) / (2 * step)
        return self.correction.activation.derivative(x) + self.epsilon * bend


def corrected(correction: Correction, epsilon: float) -> Corrected:
    """f + ε·c on the whole line, with c extended over flat intervals as in `Correction.extended`.

    Args:
        correction: From `correct`.
        epsilon: Above 0 it lowers E log|f′|, to first order and with fixed boundary values, where f rises and the
            theory applies. Flat intervals do not stay flat, so that ReLU's entropy of −∞ becomes finite for any ε ≠ 0.

    Raises:
        InputError: The correction, and so f + ε·c, has a pole (f′ passes through 0 where f is not flat).
    """
    activation = correction.activation
    branches, flat = branches_of(activation, correction.density)
    turns = [b[0] for a, b in pairwise(branches) if a[1] == b[0] and a[2] != b[2]]
    starts = [end for stretch in flat for end in stretch if _pole(correction, end)]
    if turns or starts:
        raise InputError(
            f"{activation.name}: its slope is 0 at {min((*turns, *starts), key=abs):.4g}, where the correction "
            f"p′ − p·f″/f′ has a pole; there is no corrected {activation.name}."
        )
    return Corrected(correction, float(epsilon))


def _pole(correction: Correction, end: float) -> bool:
    near = np.array([end - 1e-4, end + 1e-4, end - 1e-7, end + 1e-7])
    values = np.abs(np.nan_to_num(correction.forward(near)))
    return bool(values[2:].max() > 100 * max(values[:2].max(), 1e-3))


def correct(activation: Activation, density: Density) -> Correction:
    """The first-order correction of an activation for a density of its inputs.

    Args:
        activation: From `eafo.activations`.
        density: From `eafo.density`.

    Raises:
        InputError: The activation has no derivative, or is not strictly monotone anywhere in the density's mass.
    """
    branches, flat = branches_of(activation, density)
    if not branches:
        raise InputError(f"{activation.name} is flat wherever {density.name} has mass: there is nothing to correct.")
    found = [
        Excluded(low, high, f"f′ = 0: all of it gives {float(activation.value(low)):g}, so f has no inverse")
        for low, high in flat
    ]
    found += _folded(activation, branches)
    found += _no_mass(activation, density)
    low, high = density.within()
    for kink in (*activation.kinks, *density.kinks):
        if low < kink < high:
            whose = "f′" if kink in activation.kinks else "p"
            found.append(Excluded(kink, kink, f"{whose} has no derivative here: the correction may jump"))
    return Correction(activation, density, tuple(sorted(found, key=lambda entry: (entry.low, entry.high))))


def _folded(activation: Activation, branches: list[tuple[float, float, int]]) -> list[Excluded]:
    """The parts of branches with values that another branch also takes: f has no inverse there."""
    found = []
    for i, branch in enumerate(branches):
        low, high = range_on(activation, branch)
        for j, other in enumerate(branches):
            beneath, above = range_on(activation, other)
            shared = np.array([max(low, beneath), min(high, above)])
            if i == j or not shared[0] < shared[1]:
                continue
            ends = np.sort([_end(activation, branch, value) for value in shared.tolist()])
            way = "rises" if branch[2] > 0 else "falls"
            where = f"between {other[0]:.4g} and {other[1]:.4g}"
            reason = f"not monotone: f {way} here through values that it takes again {where}"
            found.append(Excluded(float(ends[0]), float(ends[1]), reason))
    return found


def _end(activation: Activation, branch: tuple[float, float, int], value: float) -> float:
    """The point of a branch with a value; exactly its end if bisection would find only rounding (f′ = 0)."""
    for end in branch[:2]:
        if float(activation.value(end)) == value:
            return end
    return float(inverse_on(activation, branch, np.array([value]))[0])


def _no_mass(activation: Activation, density: Density) -> list[Excluded]:
    """The intervals inside the mass where p is 0, or where f′ is so small that f″/f′ is rounding error."""
    grid = probe(activation, density)
    slope = np.abs(activation.derivative(grid))
    found = []
    for mask, reason in (
        (density.pdf(grid) <= 0, "p = 0: no pre-activation falls here, so nothing is known of f"),
        ((slope > 0) & (slope < _FLAT * slope.max()), "f′ is smaller than float64 resolves: f″/f′ is rounding error"),
    ):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        found += [
            Excluded(float(grid[a]), float(grid[b - 1]), reason)
            for a, b in zip(edges[::2], edges[1::2], strict=True)
            if b - a > 1
        ]
    return found
