"""The first-order correction of an activation for a density: the direction that lowers the entropy of its output.

Inverse form, for the inverse y of f: η(x) = −[p(y)·y″/y′ + p′(y)·y′]; moving y to y + εη changes the entropy by
−ε∫η² dx. Forward form, for f itself: c(t) = p′(t) − p(t)·f″(t)/f′(t); f + ε·c has the inverse y + εη + O(ε²).
README.md beside this file derives both.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crrelu_llm.eafo.activations import Activation
from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.entropy import branches_of, inverse_on, probe, range_on
from crrelu_llm.errors import InputError

# Below this share of its largest slope an activation counts as flat: f″/f′ would be rounding error.
_FLAT = 1e-12
# Formulas of more operations stay as they come: sympy's simplifier takes minutes for GELU × Student's t.
_SMALL = 30


@dataclass(frozen=True)
class Excluded:
    """Where the theory says nothing: a stretch of pre-activations, or a point (low == high), and why."""

    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Formula:
    """The correction between two kinks, as sympy expressions of the real symbol `t` (forward) or `x` (inverse).

    Attributes:
        low, high: The stretch of pre-activations t.
        forward: c(t), simplified; None where f′ = 0.
        direction: `forward` without its positive constant factor, which a learnable ε absorbs.
        inverse: η(x), x the output; None where sympy is not given the inverse.
    """

    low: Any
    high: Any
    forward: Any
    direction: Any
    inverse: Any


@dataclass(frozen=True)
class Correction:
    """The correction of an activation for a density.

    Attributes:
        excluded: Where it does not apply, in order.
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

    def inverse(self, x: Any) -> Array:
        """η(x) = −c(y)/f′(y) at y = f⁻¹(x), float64; NaN where no or more than one pre-activation gives x."""
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
        """Whether the theory applies at t: outside of every excluded stretch, and p > 0 there."""
        t = np.asarray(t, dtype=np.float64)
        ok = self.density.pdf(t) > 0
        for stretch in self.excluded:
            if stretch.low < stretch.high:
                ok &= (t <= stretch.low) | (t >= stretch.high)
        return ok

    @cached_property
    def formulas(self) -> tuple[Formula, ...]:
        """The correction in closed form, a `Formula` between kinks; empty where f or p has no formula."""
        import sympy

        t = sympy.Symbol("t", real=True)
        p = self.density.expression(t)
        if p is None or self.activation.pieces is None:
            return ()
        return tuple(_formula(*piece, p, t) for piece in self.activation.pieces(t))

    @property
    def latex(self) -> str:
        """The forward form in LaTeX; empty where there is no formula."""
        import sympy

        lines = [
            rf"{_latex_or_none(sympy, found.forward)} & {sympy.latex(found.low)} < t < {sympy.latex(found.high)}"
            for found in self.formulas
        ]
        if not lines:
            return ""
        return r"c(t) = \begin{cases} " + r" \\ ".join(lines) + r" \end{cases}"


def _latex_or_none(sympy: Any, formula: Any) -> str:
    return r"\text{none, } f' = 0" if formula is None else sympy.latex(formula)


def _formula(low: Any, high: Any, f: Any, p: Any, t: Any) -> Formula:
    import sympy

    slope = sympy.diff(f, t)
    if slope == 0:
        return Formula(low, high, None, None, None)
    forward = _shortest(sympy.diff(p, t) - p * sympy.diff(f, t, 2) / slope)
    factor, direction = forward.as_independent(t, as_Add=False)
    if factor.could_extract_minus_sign():
        direction = -direction
    return Formula(low, high, forward, direction, _inverse_form(f, p, t))


def _shortest(expression: Any) -> Any:
    import sympy

    candidates = [sympy.factor_terms(expression)]
    if sympy.count_ops(expression) < _SMALL:
        candidates += [sympy.factor(expression), sympy.factor(sympy.simplify(expression))]
    return min(candidates, key=sympy.count_ops)


def _inverse_form(f: Any, p: Any, t: Any) -> Any:
    """η(x) for those f whose inverse is elementary; the others' is computed numerically."""
    import sympy

    x = sympy.Symbol("x", real=True)
    y = _inverse_of(f, t, x)
    if y is None:
        return None
    slope = sympy.diff(y, x)
    return _shortest(-(p.subs(t, y) * sympy.diff(y, x, 2) / slope + sympy.diff(p, t).subs(t, y) * slope))


def _inverse_of(f: Any, t: Any, x: Any) -> Any:
    import sympy

    log, exp = sympy.log, sympy.exp
    for candidate, inverse in (
        (log(1 + exp(t)), log(exp(x) - 1)),
        (sympy.tanh(t), sympy.atanh(x)),
        (1 / (1 + exp(-t)), log(x / (1 - x))),
        (t**2, sympy.sqrt(x)),
    ):
        if f == candidate:
            return inverse
    if f.is_polynomial(t) and sympy.degree(f, t) == 1:
        return x / sympy.diff(f, t)
    scale = sympy.expand(sympy.diff(f, t) * exp(-t))
    if not scale.free_symbols:  # α·(eᵗ − 1)
        return log(1 + x / scale)
    return None


def correct(activation: Activation, density: Density) -> Correction:
    """The first-order correction of an activation for a density of its inputs.

    Args:
        activation: From `eafo.activations`.
        density: From `eafo.density`.

    Raises:
        InputError: The activation has no derivative, or nowhere in the density's mass a strictly monotone stretch.
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
    """The parts of branches whose values another branch takes too: there is no inverse there."""
    found = []
    for i, branch in enumerate(branches):
        low, high = range_on(activation, branch)
        for j, other in enumerate(branches):
            beneath, above = range_on(activation, other)
            shared = np.array([max(low, beneath), min(high, above)])
            if i == j or not shared[0] < shared[1]:
                continue
            ends = np.sort(inverse_on(activation, branch, shared))
            way = "rises" if branch[2] > 0 else "falls"
            where = f"between {other[0]:.4g} and {other[1]:.4g}"
            reason = f"not monotone: f {way} here through values that it takes again {where}"
            found.append(Excluded(float(ends[0]), float(ends[1]), reason))
    return found


def _no_mass(activation: Activation, density: Density) -> list[Excluded]:
    """The stretches inside the mass where p is 0, and f′ so small that f″/f′ is rounding error."""
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
