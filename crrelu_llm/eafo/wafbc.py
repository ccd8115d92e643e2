"""WAFBC, the worst activation function with boundary conditions: the activation with the largest output entropy.

Between two boundary values the uniform density has the largest differential entropy, and the input's own distribution
function makes the output uniform: f = low + (high − low)·F, so f′ = (high − low)·p, the solution of the Euler–Lagrange
equation y′·p(y) = const for the inverse y.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.entropy import of_output
from crrelu_llm.errors import InputError


@dataclass(frozen=True)
class Wafbc:
    """The WAFBC of a density, or (with `warp`) a still rising neighbour with the same boundary values.

    Attributes:
        density: The density of the pre-activations.
        low, high: The boundary values, at the ends of the density's support.
        warp: Coefficients a of u + Σₖ aₖ·sin(πku)/(πk), k = 1, 2, …, which is applied to F before the scaling.
    """

    density: Density
    low: float
    high: float
    warp: tuple[float, ...] = ()
    kinks: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The name in messages and plots."""
        return f"wafbc({self.density.name},{self.low:g},{self.high:g})"

    def _harmonics(self) -> Array:
        return np.pi * np.arange(1, len(self.warp) + 1, dtype=np.float64)

    def value(self, x: Any) -> Array:
        """f(x)."""
        u = self.density.cdf(x)
        k = self._harmonics()
        bent = u + (np.sin(u[..., None] * k) / k) @ np.array(self.warp) if self.warp else u
        return self.low + (self.high - self.low) * bent

    def derivative(self, x: Any) -> Array:
        """f′(x)."""
        slope = (self.high - self.low) * self.density.pdf(x)
        if not self.warp:
            return slope
        return slope * (1 + np.cos(self.density.cdf(x)[..., None] * self._harmonics()) @ np.array(self.warp))

    def second(self, x: Any) -> Array:
        """f″(x)."""
        k, u, p = self._harmonics(), self.density.cdf(x), self.density.pdf(x)
        bent, turn = np.ones_like(u), np.zeros_like(u)
        if self.warp:
            bent = 1 + np.cos(u[..., None] * k) @ np.array(self.warp)
            turn = -(np.sin(u[..., None] * k) * k) @ np.array(self.warp)
        return (self.high - self.low) * (self.density.derivative(x) * bent + p * p * turn)

    def _derivatives(self, x: Any) -> tuple[Array, Array]:
        return self.derivative(x), self.second(x)

    def pieces(self, symbol: Any) -> list[tuple[Any, Any, Any]]:
        """The formula on the whole line, in the form of `Activation.pieces`; empty without a formula."""
        import sympy

        formula = self.expression(symbol)
        return [] if formula is None else [(-sympy.oo, sympy.oo, formula)]

    def expression(self, symbol: Any) -> Any:
        """f as a sympy expression, if sympy can integrate the density's expression; else None."""
        import sympy

        p = self.density.expression(symbol)
        if p is None or self.warp:
            return None
        primitive = sympy.integrate(p, symbol)
        if primitive.has(sympy.Integral):
            return None
        below = sympy.limit(primitive, symbol, -sympy.oo)
        low, high = (sympy.nsimplify(value, rational=True) for value in (self.low, self.high))
        return sympy.simplify(low + (high - low) * (primitive - below))


def wafbc(density: Density, low: float = 0.0, high: float = 1.0) -> Wafbc:
    """The worst activation of a density between two boundary values.

    Its output is uniform: the entropy is log(high − low), the largest for activations with these boundary values.

    Raises:
        InputError: low ≥ high, or a boundary value is not finite.
    """
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(
            f"wafbc: the boundary values {low:g} and {high:g} must be finite, the first below the second."
        )
    return Wafbc(density, float(low), float(high))


def perturbed(worst: Wafbc, size: float, count: int, seed: int = 0, harmonics: int = 6) -> list[Wafbc]:
    """Neighbours of a WAFBC in random directions, with the same boundary values, still rising.

    Args:
        worst: The WAFBC to perturb.
        size: The largest distance from 1 of the slope relative to the WAFBC's: in (0, 1).
        count: How many neighbours to return.
        seed: The seed of the directions.
        harmonics: Number of sines in a direction.
    """
    if not 0 < size < 1:
        raise InputError(f"wafbc: a perturbation of size {size:g} would not rise everywhere; give 0 < size < 1.")
    found = []
    u = np.linspace(0, 1, 2001)
    for row in np.random.default_rng(seed).normal(size=(count, harmonics)):
        bend = np.cos(u[:, None] * np.pi * np.arange(1, harmonics + 1)) @ row
        found.append(Wafbc(worst.density, worst.low, worst.high, tuple((row * size / np.abs(bend).max()).tolist())))
    return found


def losses(worst: Wafbc, size: float, count: int, seed: int = 0) -> Array:
    """The entropy loss of each of `count` random perturbations of the WAFBC: nats, float64, shape (count,)."""
    most = of_output(worst, worst.density).value
    return np.array([most - of_output(one, worst.density).value for one in perturbed(worst, size, count, seed)])
