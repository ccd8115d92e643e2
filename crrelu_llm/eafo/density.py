"""Probability densities of pre-activations: named ones and mixtures (estimates.py: from samples and functions).

Each density has its derivative in closed form: the correction needs p′, and the p′ of a noisy p is mostly noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crrelu_llm.errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]
Function = Callable[[Array], Array]

# The probability on each side that searches and quadratures may leave out.
_TAIL = 1e-12
_LARGEST = 1e30


@dataclass(frozen=True)
class Density:
    """A probability density p on the real line; all functions are float64 and elementwise.

    Attributes:
        name: The name, in the notation of `eafo.parsing.density` where possible.
        support: The interval outside which p is 0; may be infinite.
        mean, std: First moment and standard deviation (infinite where the moment does not exist).
        kinks: The points where p has no derivative.
    """

    name: str
    support: tuple[float, float]
    mean: float
    std: float
    _pdf: Function
    _derivative: Function
    _cdf: Function
    _quantile: Function | None = None
    kinks: tuple[float, ...] = ()
    _expression: Callable[[Any], Any] | None = None
    _entropy: float | None = field(default=None, compare=False)

    def pdf(self, x: Any) -> Array:
        """p(x)."""
        return self._pdf(np.asarray(x, dtype=np.float64))

    def derivative(self, x: Any) -> Array:
        """p′(x); at a kink, the mean of the two sides."""
        return self._derivative(np.asarray(x, dtype=np.float64))

    def log_derivative(self, x: Any) -> Array:
        """p′(x)/p(x), the score; NaN where p is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.derivative(x) / self.pdf(x)

    def cdf(self, x: Any) -> Array:
        """The probability below x."""
        return self._cdf(np.asarray(x, dtype=np.float64))

    def quantile(self, q: Any) -> Array:
        """The x with the probability q below it, for 0 < q < 1."""
        q = np.asarray(q, dtype=np.float64)
        return (
            self._quantile(q)
            if self._quantile is not None
            else _bisect(self.cdf, q, self.support, self.mean if np.isfinite(self.mean) else 0.0)
        )

    def expression(self, symbol: Any) -> Any:
        """p as a sympy expression of a real symbol; None without a formula (samples, functions)."""
        return None if self._expression is None else self._expression(symbol)

    @property
    def center(self) -> float:
        """The mean, or the median if there is no mean: the starting point of plots and searches."""
        return self.mean if np.isfinite(self.mean) else float(self.quantile(0.5))

    @property
    def spread(self) -> float:
        """The standard deviation, or if it is infinite the interquartile range relative to that of N(0, 1)."""
        if np.isfinite(self.std):
            return self.std
        low, high = self.quantile([0.25, 0.75]).tolist()
        return (high - low) / 1.349

    def within(self, tail: float = _TAIL) -> tuple[float, float]:
        """The interval that leaves out the probability `tail` on each side: the range of quadratures."""
        low, high = self.quantile([tail, 1 - tail]).tolist()
        return max(low, self.support[0]), min(high, self.support[1])


def _bisect(cdf: Function, q: Array, support: tuple[float, float], start: float) -> Array:
    """Inverts a distribution function by expanding an interval and then bisecting it."""
    reach = 1.0
    low, high = (np.full(q.shape, max(support[0], start - reach)), np.full(q.shape, min(support[1], start + reach)))
    for _ in range(200):
        short, beyond = (cdf(low) > q) & (low > support[0]), (cdf(high) < q) & (high < support[1])
        if not (short.any() or beyond.any()):
            break
        reach *= 2
        low = np.where(short, max(support[0], start - reach), low)
        high = np.where(beyond, min(support[1], start + reach), high)
    for _ in range(100):
        middle = (low + high) / 2
        below = cdf(middle) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _from_scipy(
    name: str, frozen: Any, score: Function, kinks: tuple[float, ...], expression: Callable[[Any], Any]
) -> Density:
    def derivative(x: Array) -> Array:
        return frozen.pdf(x) * score(x)

    return Density(
        name,
        (-np.inf, np.inf),
        float(frozen.mean()),
        float(frozen.std()),
        frozen.pdf,
        derivative,
        frozen.cdf,
        frozen.ppf,
        kinks,
        expression,
        float(frozen.entropy()),
    )


def _check(name: str, loc: float, scale: float, more: tuple[float, ...] = ()) -> None:
    if not np.isfinite([loc, scale, *more]).all():
        raise InputError(f"density {name}: its parameters must be finite numbers, not {(*more, loc, scale)}.")
    if min((scale, *more)) <= 0:
        raise InputError(f"density {name}: scale and degrees of freedom must be above 0, not {(*more, scale)}.")
    if not 1e-6 * max(abs(loc), 1e-24) < scale < _LARGEST:
        raise InputError(f"density {name}: float64 does not resolve a scale of {scale:g} around {loc:g}.")


def _exact(value: float) -> Any:
    """A float as the short fraction that it stands for: 0.1 is 1/10 in formulas."""
    import sympy

    return sympy.nsimplify(value, rational=True)


def normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """N(mean, std²).

    Raises:
        InputError: A parameter is not finite, or the standard deviation is not above 0 (as for the other densities).
    """
    from scipy import stats

    _check("normal", mean, std)

    def expression(t: Any) -> Any:
        import sympy

        m, s = _exact(mean), _exact(std)
        return sympy.exp(-(((t - m) / s) ** 2) / 2) / (s * sympy.sqrt(2 * sympy.pi))

    frozen = stats.norm(mean, std)
    return _from_scipy(f"normal({mean:g},{std:g})", frozen, lambda x: (mean - x) / std**2, (), expression)


def logistic(loc: float = 0.0, scale: float = 1.0) -> Density:
    """The density with mean loc and standard deviation scale·π/√3; its distribution function is the sigmoid."""
    from scipy import stats

    _check("logistic", loc, scale)

    def expression(t: Any) -> Any:
        import sympy

        z = (t - _exact(loc)) / _exact(scale)
        return sympy.exp(-z) / (_exact(scale) * (1 + sympy.exp(-z)) ** 2)

    frozen = stats.logistic(loc, scale)
    name = f"logistic({loc:g},{scale:g})"
    return _from_scipy(name, frozen, lambda x: -np.tanh((x - loc) / (2 * scale)) / scale, (), expression)


def laplace(loc: float = 0.0, scale: float = 1.0) -> Density:
    """exp(−|x − loc|/scale)/(2·scale), with a kink at loc."""
    from scipy import stats

    _check("laplace", loc, scale)

    def expression(t: Any) -> Any:
        import sympy

        return sympy.exp(-sympy.Abs(t - _exact(loc)) / _exact(scale)) / (2 * _exact(scale))

    frozen = stats.laplace(loc, scale)
    name = f"laplace({loc:g},{scale:g})"
    return _from_scipy(name, frozen, lambda x: -np.sign(x - loc) / scale, (loc,), expression)


def student_t(df: float = 5.0, loc: float = 0.0, scale: float = 1.0) -> Density:
    """Student's t with `df` degrees of freedom, shifted by loc and scaled by scale."""
    from scipy import stats

    _check("student_t", loc, scale, (df,))

    def expression(t: Any) -> Any:
        import sympy

        n, s = _exact(df), _exact(scale)
        factor = sympy.gamma((n + 1) / 2) / (sympy.gamma(n / 2) * sympy.sqrt(n * sympy.pi) * s)
        return factor * (1 + ((t - _exact(loc)) / s) ** 2 / n) ** (-(n + 1) / 2)

    def score(x: Array) -> Array:
        z = (x - loc) / scale
        return -(df + 1) * z / (df + z**2) / scale

    frozen = stats.t(df, loc, scale)
    return _from_scipy(f"student_t({df:g},{loc:g},{scale:g})", frozen, score, (), expression)


def mixture(components: Sequence[Density], weights: Sequence[float]) -> Density:
    """The weighted sum of densities.

    Raises:
        InputError: There is no component, a weight is negative or not finite, or the weights do not sum to 1.
    """
    if not components or len(components) != len(weights):
        raise InputError(f"density mixture: {len(components)} components need as many weights, not {len(weights)}.")
    if not np.isfinite(weights).all() or min(weights) < 0:
        raise InputError(f"density mixture: the weights {list(weights)} make it negative somewhere; give weights ≥ 0.")
    if abs(sum(weights) - 1) > 1e-6:
        raise InputError(
            f"density mixture: the weights sum to {sum(weights):g}; divide them by that: they must sum to 1."
        )
    parts = [(part, weight) for part, weight in zip(components, weights, strict=True) if weight > 0]
    mean = sum(weight * part.mean for part, weight in parts)
    if not np.isfinite(mean):
        mean = np.nan
    second = sum(weight * (part.std**2 + part.mean**2) for part, weight in parts)
    variance = second - mean**2

    def total(name: str) -> Function:
        return lambda x: np.sum([weight * getattr(part, name)(x) for part, weight in parts], axis=0)

    def expression(t: Any) -> Any:
        formulas = [(part.expression(t), weight) for part, weight in parts]
        if any(formula is None for formula, _ in formulas):
            return None
        return sum(_exact(weight) * formula for formula, weight in formulas)

    return Density(
        " + ".join(f"{weight:g}*{part.name}" for part, weight in parts),
        (min(part.support[0] for part, _ in parts), max(part.support[1] for part, _ in parts)),
        mean,
        float(np.sqrt(variance)) if np.isfinite(variance) else np.inf,
        total("pdf"),
        total("derivative"),
        total("cdf"),
        kinks=tuple(sorted({kink for part, _ in parts for kink in part.kinks})),
        _expression=expression,
    )
