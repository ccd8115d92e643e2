"""Probability densities of pre-activations: named ones, mixtures, smooth ones from samples, and any function.

Each knows its derivative in closed form, because the correction needs p′ and p′ of a noisy p is mostly noise.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from crrelu_llm.errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]
Function = Callable[[Array], Array]

MIN_SAMPLES = 100
# A kernel's width in bins: what binning adds to the variance, 1/12 of a bin squared, is 0.3 % of the kernel's own.
_BINS_PER_BANDWIDTH = 5
# So much probability may lie beyond the points that searches and quadratures look at, on each side.
_TAIL = 1e-12
_LARGEST = 1e30


@dataclass(frozen=True)
class Density:
    """A probability density p on the real line; all functions are float64 and elementwise.

    Attributes:
        name: As `eafo.parsing.density` reads it, where it can.
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
        """The x below which the probability is q, for 0 < q < 1."""
        q = np.asarray(q, dtype=np.float64)
        return (
            self._quantile(q)
            if self._quantile is not None
            else _bisect(self.cdf, q, self.support, self.mean if np.isfinite(self.mean) else 0.0)
        )

    def expression(self, symbol: Any) -> Any:
        """p as a sympy expression of a real symbol; None where there is no formula (samples, functions)."""
        return None if self._expression is None else self._expression(symbol)

    @property
    def center(self) -> float:
        """The mean, or the median where there is no mean: where pictures and searches begin."""
        return self.mean if np.isfinite(self.mean) else float(self.quantile(0.5))

    @property
    def spread(self) -> float:
        """The standard deviation, or where it is infinite the distance of the quartiles over that of N(0, 1)."""
        if np.isfinite(self.std):
            return self.std
        low, high = self.quantile([0.25, 0.75]).tolist()
        return (high - low) / 1.349

    def within(self, tail: float = _TAIL) -> tuple[float, float]:
        """The interval that leaves out `tail` of the probability on each side: where quadratures look."""
        low, high = self.quantile([tail, 1 - tail]).tolist()
        return max(low, self.support[0]), min(high, self.support[1])


def _bisect(cdf: Function, q: Array, support: tuple[float, float], start: float) -> Array:
    """Inverts a distribution function by doubling an interval, then halving it."""
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
    """A float as the short fraction that was meant: 0.1 is 1/10 in formulas."""
    import sympy

    return sympy.nsimplify(value, rational=True)


def normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """N(mean, std²).

    Raises:
        InputError: A parameter is not finite, or the standard deviation not above 0 (so for all that follow).
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
    """The density of mean loc and standard deviation scale·π/√3, whose distribution function is the sigmoid."""
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
    """Student's t with `df` degrees of freedom, moved by loc and stretched by scale."""
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
        InputError: No component, a weight that is negative or not finite, or weights that do not sum to 1.
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


def from_samples(samples: Any, bandwidth: float | None = None, name: str = "samples") -> Density:
    """A smooth density from samples: the kernel estimate with normal kernels, on binned samples.

    Args:
        samples: Numbers of any shape and dtype, at least `MIN_SAMPLES`.
        bandwidth: The kernels' standard deviation, in the samples' units. Default: Silverman's rule,
            0.9·min(s, IQR/1.34)·n^(−1/5) (Silverman, Density Estimation, 1986, eq. 3.31).
        name: For messages and pictures.

    Raises:
        InputError: Too few samples, values that are not finite, samples that do not vary, or a bandwidth ≤ 0.
    """
    values = numbers(samples, f"density of {name}")
    if values.size < MIN_SAMPLES:
        raise InputError(f"density of {name}: {values.size} samples are too few; give at least {MIN_SAMPLES}.")
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise InputError(f"density of {name}: {count} of {values.size} samples are NaN or infinite; leave them out.")
    std = float(values.std())
    if np.abs(values).max() > _LARGEST:
        raise InputError(f"density of {name}: a sample is {np.abs(values).max():g}, beyond what can be squared.")
    if std <= 1e-12 * abs(float(values.mean())) or std == 0:
        raise InputError(f"density of {name}: all {values.size} samples are {values[0]:g}, a constant has no density.")
    if bandwidth is None:
        quartiles = float(np.subtract(*np.percentile(values, [75, 25]))) / 1.34
        bandwidth = 0.9 * (min(std, quartiles) or std) * values.size**-0.2
    if not bandwidth > 0:
        raise InputError(f"density of {name}: a bandwidth of {bandwidth:g} is not above 0.")
    # Equal bins, each replaced by the mean of what is in it; empty ones do not count.
    place = np.floor((values - values.min()) * (_BINS_PER_BANDWIDTH / bandwidth))
    _, place, counts = np.unique(place, return_inverse=True, return_counts=True)
    centers = np.bincount(place, values) / counts
    return _kernels(name, centers, counts / values.size, bandwidth, (float(values.mean()), std))


def numbers(samples: Any, what: str) -> Array:
    """Samples as a flat float64 array.

    Raises:
        InputError: They are no real numbers.
    """
    values = np.asarray(samples)
    if values.dtype.kind not in "fiu":
        raise InputError(f"{what}: the samples are of type {values.dtype}; give real numbers.")
    return values.astype(np.float64).ravel()


def _kernels(name: str, centers: Array, weights: Array, width: float, moments: tuple[float, float]) -> Density:
    """A sum of normal kernels of one width, evaluated in blocks that fit the cache."""
    from scipy.special import ndtr

    scale = 1 / (width * np.sqrt(2 * np.pi))

    def over(term: Function) -> Function:
        def total(x: Array) -> Array:
            flat = x.ravel()
            out = np.empty_like(flat)
            for start in range(0, flat.size, 256):
                block = flat[start : start + 256]
                out[start : start + 256] = term((block[:, None] - centers) / width) @ weights
            return out.reshape(x.shape)

        return total

    mean, std = moments
    return Density(
        name,
        (-np.inf, np.inf),
        mean,
        float(np.hypot(std, width)),
        over(lambda z: scale * np.exp(-z * z / 2)),
        over(lambda z: -scale / width * z * np.exp(-z * z / 2)),
        over(ndtr),
    )


def from_function(pdf: Function, low: float, high: float, name: str = "function") -> Density:
    """A density from any function, checked to be one.

    Args:
        pdf: Takes and gives float64 arrays; 0 outside the interval.
        low: Start of the interval where it is not 0; may be infinite.
        high: End of that interval; may be infinite.
        name: For messages and pictures.

    Raises:
        InputError: The function is negative or not finite somewhere, cannot be integrated, or does not integrate to 1.
    """
    from scipy.integrate import quad

    def at(x: Array) -> Array:
        return np.where((x >= low) & (x <= high), np.asarray(pdf(np.clip(x, low, high)), dtype=np.float64), 0.0)

    if not low < high:
        raise InputError(f"density {name}: the interval from {low:g} to {high:g} is empty; give low < high.")
    grid = np.concatenate([np.linspace(-50, 50, 20001), *(sign * np.geomspace(50, 1e6, 20001) for sign in (-1, 1))])
    grid = np.sort(grid[(grid >= low) & (grid <= high)])
    if not grid.size:
        grid = np.linspace(low, high, 20001)
    try:
        values = at(grid)
    except (TypeError, ValueError) as error:
        raise InputError(f"density {name} takes no float64 array ({error}); wrap it: numpy.vectorize(pdf).") from None
    if not np.isfinite(values).all():
        where = grid[~np.isfinite(values)][0]
        raise InputError(f"density {name}: it is not finite at {where:g}; a density is a finite number there.")
    if values.min() < 0:
        where = grid[values.argmin()]
        raise InputError(f"density {name}: it is {values.min():g} at {where:g}; a density is nowhere negative.")

    def moment(power: int, lower: float = low, upper: float = high) -> float:
        return float(quad(lambda x: x**power * float(at(np.asarray(x))), lower, upper, limit=500)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mass = moment(0)
        except Warning:
            raise InputError(f"density {name}: its integral from {low:g} to {high:g} does not exist.") from None
    if not abs(mass - 1) < 1e-6:
        raise InputError(f"density {name}: it integrates to {mass:g}; divide it by that: a density integrates to 1.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mean = moment(1)
            std = float(np.sqrt(max(moment(2) - mean**2, 0.0)))
        except Warning:
            raise InputError(
                f"density {name}: its mean or its variance does not exist; EAFO needs both here."
            ) from None
    return _tabulated(name, at, (low, high), mean, std, moment)


def _tabulated(
    name: str, pdf: Function, support: tuple[float, float], mean: float, std: float, moment: Callable[..., float]
) -> Density:
    """Gives a function the distribution function by cumulative quadrature, and its derivative by differences."""
    from scipy.integrate import fixed_quad
    from scipy.interpolate import PchipInterpolator

    low, high = max(support[0], mean - 40 * std), min(support[1], mean + 40 * std)
    knots = np.linspace(low, high, 4001)
    pieces = [fixed_quad(pdf, a, b, n=8)[0] for a, b in pairwise(knots)]
    below = moment(0, support[0], low) if low > support[0] else 0.0
    table = PchipInterpolator(knots, np.clip(below + np.concatenate([[0.0], np.cumsum(pieces)]), 0, 1))
    step = std * 1e-4

    def derivative(x: Array) -> Array:
        # Fourth order; at the ends of the support its slope just inside, not the jump to 0.
        inside = (x >= support[0]) & (x <= support[1])
        x = np.clip(x, support[0] + 2 * step, support[1] - 2 * step)
        return np.where(inside, differences(x), 0.0)

    def differences(x: Array) -> Array:
        return (8 * (pdf(x + step) - pdf(x - step)) - (pdf(x + 2 * step) - pdf(x - 2 * step))) / (12 * step)

    return Density(name, support, mean, std, pdf, derivative, lambda x: np.clip(table(np.clip(x, low, high)), 0, 1))
