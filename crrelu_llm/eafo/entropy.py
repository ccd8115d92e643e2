"""Entropy in nats of densities, of an activation's output (by quadrature), and of samples (by spacings).

Differential entropy depends on scale, h(aX) = h(X) + log|a|, so a smaller output always has lower entropy. Therefore
every result here also includes the entropy at unit variance and the negentropy, which do not depend on scale. Where an
activation is flat, its output takes one value with positive probability (an atom), and the differential entropy is −∞.
The entropy at a finite resolution stays finite there, and can be compared.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from crrelu_llm.eafo.density import Array, Density
from crrelu_llm.eafo.estimates import MIN_SAMPLES, numbers
from crrelu_llm.errors import InputError

OF_A_NORMAL = float(0.5 * np.log(2 * np.pi * np.e))
"""The entropy of N(0, 1), the largest at unit variance, in nats."""
RESOLUTION = 0.05
"""Default width of the rounding cells, in standard deviations of the output."""
# A flat interval with less probability is not an atom: far out, smooth activations underflow to a constant in float64.
_NEGLIGIBLE = 1e-5
# A repeated value is an atom from this share of the samples on; from a smaller share with many samples, because √n
# equal values fill the spacings on which the estimate is based.
_ATOM_SHARE = 0.01
_SHIFTS = 8


class Scalar(Protocol):
    """The required interface of an activation: see `eafo.activations.Activation`."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def kinks(self) -> tuple[float, ...]:
        """Points without a derivative."""

    def value(self, x: Any) -> Array:
        """f(x)."""

    def derivative(self, x: Any) -> Array:
        """f′(x)."""


@dataclass(frozen=True)
class OutputEntropy:
    """The entropy of f(X), where X has a known density.

    Attributes:
        value: Differential entropy in nats; −∞ with atoms.
        atoms: Pairs of a value of f and the probability of the interval where f takes it.
        std: Standard deviation of the output.
        standardised: `value − log std`: the entropy at unit variance; at most `OF_A_NORMAL`.
        negentropy: `OF_A_NORMAL − standardised`: distance from the normal in nats, ≥ 0.
        at_resolution: Entropy of the output rounded to `resolution`·std, plus log(resolution): near `standardised`
            without atoms, finite with atoms.
        resolution: The width of a cell in standard deviations.
    """

    value: float
    atoms: tuple[tuple[float, float], ...]
    std: float
    standardised: float
    negentropy: float
    at_resolution: float
    resolution: float


@dataclass(frozen=True)
class Estimate:
    """The entropy of samples: the fields of `OutputEntropy`, with their errors.

    Attributes:
        standard_error: The standard error of `value`, from the spread over disjoint parts of the samples.
        bias: The expected bias of `value`, from its change with half the samples; not subtracted. The estimate assumes
            that the bias falls like n^(−1/2), as it does for spacings of order √n; for heavy tails (Student's t with 3
            degrees of freedom or less) the estimate is too small.
        n: Number of samples.
        method: The estimator that scipy chooses for this number of samples.
    """

    value: float
    standard_error: float
    bias: float
    n: int
    method: str
    atoms: tuple[tuple[float, float], ...]
    std: float
    standardised: float
    negentropy: float
    at_resolution: float
    resolution: float


def of_density(density: Density) -> float:
    """The differential entropy of a density in nats: in closed form if known, else by quadrature."""
    if density._entropy is not None:
        return density._entropy

    def integrand(x: Array) -> Array:
        p = density.pdf(x)
        return -p * np.log(np.where(p > 0, p, 1.0))

    return integral(integrand, _splits(density, density.kinks))


def of_output(activation: Scalar, density: Density, resolution: float = RESOLUTION) -> OutputEntropy:
    """The entropy of f(X), where X has the given density.

    For a strictly monotone f the entropy is h(X) + E log|f′(X)|. Otherwise the output's density is the sum over the
    branches, p_Y(f(x)) = Σ p(x_b)/|f′(x_b)| with f(x_b) = f(x), and the entropy is −E log p_Y(f(X)).

    Args:
        activation: Has `.value`, `.derivative` and `.kinks`.
        density: The density of the pre-activations.
        resolution: Width of the cells of `at_resolution`, in standard deviations of the output.

    Raises:
        InputError: The output is constant.
    """
    grid = probe(activation, density)
    cells, weights = activation.value((grid[:-1] + grid[1:]) / 2), np.diff(density.cdf(grid))
    weights = weights / weights.sum()
    std = float(np.sqrt(np.average((cells - np.average(cells, weights=weights)) ** 2, weights=weights)))
    if not std > 0:
        raise InputError(f"{activation.name} of {density.name} is constant: its entropy has no meaning.")
    branches, flat = branches_of(activation, density)
    atoms = tuple((float(activation.value(low)), float(density.cdf(high) - density.cdf(low))) for low, high in flat)
    atoms = tuple(atom for atom in atoms if atom[1] > _NEGLIGIBLE)
    value = -np.inf if atoms else _over_branches(activation, density, branches)
    return OutputEntropy(
        value, atoms, std, *_relative(value, std), _rounded(cells, weights, std, resolution), resolution
    )


def from_samples(samples: Any, resolution: float = RESOLUTION) -> Estimate:
    """Estimates the differential entropy of samples by `scipy.stats.differential_entropy` (spacings).

    Args:
        samples: Independent values of any shape, at least `MIN_SAMPLES`.
        resolution: Width of the cells of `at_resolution`, in standard deviations of the samples.

    Raises:
        InputError: There are too few samples, values are not finite, or the samples do not vary.
    """
    from scipy.stats import differential_entropy

    values = numbers(samples, "entropy")
    n = values.size
    if n < MIN_SAMPLES:
        raise InputError(f"entropy: {n} samples are too few; give at least {MIN_SAMPLES}.")
    if not np.isfinite(values).all():
        raise InputError(f"entropy: {int((~np.isfinite(values)).sum())} of {n} samples are NaN or infinite.")
    std = float(values.std())
    if std <= 1e-12 * abs(float(values.mean())) or std == 0:
        raise InputError(f"entropy: all {n} samples are {values[0]:g}, a constant has no density.")
    kinds, counts = np.unique(values, return_counts=True)
    repeated = np.flatnonzero(counts >= max(5, min(_ATOM_SHARE * n, np.sqrt(n))))
    atoms = tuple((float(kinds[i]), float(counts[i] / n)) for i in repeated)
    # scipy's own rule for method="auto", made explicit because the result depends on the method.
    method = "van es" if n <= 10 else "ebrahimi" if n <= 1000 else "vasicek"
    if atoms:
        value, error, bias = -np.inf, 0.0, 0.0
    else:
        value = float(differential_entropy(values, method=method))
        # Neighbouring values may be similar (channels, positions), so the parts are drawn at random.
        mixed = np.random.default_rng(0).permutation(values)
        parts = [float(differential_entropy(part, method=method)) for part in np.array_split(mixed, 10)]
        error = float(np.std(parts, ddof=1) / np.sqrt(len(parts)))
        halves = float(np.mean([differential_entropy(part, method=method) for part in np.array_split(mixed, 2)]))
        bias = (halves - value) / (np.sqrt(2) - 1)
    weights = np.full(n, 1 / n)
    rest = (std, *_relative(value, std), _rounded(values, weights, std, resolution), resolution)
    return Estimate(value, error, bias, n, method, atoms, *rest)


def _relative(value: float, std: float) -> tuple[float, float]:
    standardised = float(value - np.log(std))
    return standardised, OF_A_NORMAL - standardised


def _rounded(values: Array, weights: Array, std: float, resolution: float) -> float:
    """The entropy of values rounded to cells of width resolution·std, plus log resolution.

    The mean over several positions of the cell borders, which affect the entropy of steep densities.
    """
    found = []
    for shift in np.arange(_SHIFTS) / _SHIFTS:
        place = np.floor(values / (resolution * std) + shift).astype(np.int64)
        _, place = np.unique(place, return_inverse=True)
        share = np.bincount(place, weights)
        share = share[share > 0]
        found.append(float(-(share * np.log(share)).sum()))
    return float(np.mean(found) + np.log(resolution))


def probe(activation: Scalar, density: Density) -> Array:
    """Points at which to evaluate an activation: over the density's whole mass, and densely where activations bend."""
    low, high = density.within()
    fine = np.linspace(max(low, min(-15.0, high)), min(high, max(15.0, low)), 20001)
    points = np.concatenate([np.linspace(low, high, 4001), fine, [k for k in activation.kinks if low < k < high]])
    return np.unique(points)


def branches_of(
    activation: Scalar, density: Density
) -> tuple[list[tuple[float, float, int]], list[tuple[float, float]]]:
    """The intervals where an activation is strictly monotone, and where it is flat.

    Returns:
        Branches `(low, high, +1 rising | −1 falling)` and flat intervals `(low, high)`, each in order, together
        covering the density's mass.
    """
    grid = probe(activation, density)
    middles = (grid[:-1] + grid[1:]) / 2
    slope = activation.derivative(middles)
    signs = np.sign(slope).astype(int)
    # At a kink the function may also jump and take values twice, so a branch ends there too.
    breaks = (np.diff(signs) != 0) | np.isin(grid[1:-1], activation.kinks)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    edges = [float(grid[0])]
    for start in starts[1:].tolist():
        edges.append(_turn(activation, float(middles[start - 1]), float(middles[start]), float(grid[start])))
    edges.append(float(grid[-1]))
    branches, flat = [], []
    for i, start in enumerate(starts.tolist()):
        stretch = (edges[i], edges[i + 1])
        if signs[start] == 0:
            flat.append(stretch)
        else:
            branches.append((*stretch, int(signs[start])))
    return branches, flat


def _turn(activation: Scalar, left: float, right: float, otherwise: float) -> float:
    """The point between two others where the derivative changes sign, or the kink or end of a flat interval there."""
    for kink in activation.kinks:
        if left <= kink <= right:
            return float(kink)
    from scipy.optimize import brentq

    slopes = activation.derivative(np.array([left, right]))
    if slopes[0] * slopes[1] >= 0:
        return otherwise
    return float(brentq(lambda x: float(activation.derivative(np.float64(x))), left, right, xtol=1e-14))


def inverse_on(activation: Scalar, branch: tuple[float, float, int], values: Array) -> Array:
    """The x of a monotone branch with f(x) = value, by bisection; values outside the branch give its nearer end."""
    low, high = np.full(values.shape, branch[0]), np.full(values.shape, branch[1])
    for _ in range(60):
        middle = (low + high) / 2
        below = (activation.value(middle) < values) if branch[2] > 0 else (activation.value(middle) > values)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def range_on(activation: Scalar, branch: tuple[float, float, int]) -> tuple[float, float]:
    """The lowest and the highest value of a monotone branch."""
    low, high = sorted(activation.value(np.array(branch[:2])).tolist())
    return low, high


def _over_branches(activation: Scalar, density: Density, branches: list[tuple[float, float, int]]) -> float:
    ranges = [range_on(activation, branch) for branch in branches]
    total = 0.0
    for i, branch in enumerate(branches):
        others = [
            (other, reach)
            for j, (other, reach) in enumerate(zip(branches, ranges, strict=True))
            if j != i and min(reach[1], ranges[i][1]) > max(reach[0], ranges[i][0])
        ]

        def integrand(x: Array, others: list[Any] = others) -> Array:
            p, slope = density.pdf(x), np.abs(activation.derivative(x))
            with np.errstate(divide="ignore", invalid="ignore"):
                output = p / slope
                values = activation.value(x)
                for other, (low, high) in others:
                    back = inverse_on(activation, other, values)
                    add = density.pdf(back) / np.abs(activation.derivative(back))
                    output += np.where((values > low) & (values < high), add, 0.0)
                summand = -p * np.log(output)
            return np.where(np.isfinite(summand), summand, 0.0)

        # The output's density jumps where the values of another branch end.
        ends = np.array([end for _, reach in others for end in reach if ranges[i][0] < end < ranges[i][1]])
        breaks = [*activation.kinks, *density.kinks, *(inverse_on(activation, branch, ends) if ends.size else ())]
        total += integral(integrand, _splits(density, breaks, branch[:2]))
    return total


def _splits(density: Density, breaks: Any, within: tuple[float, float] | None = None) -> Array:
    low, high = within or density.within()
    center, width = density.center, density.spread
    marks = [center + sign * k * width for k in (0, 1, 3, 10, 30, 100) for sign in (-1, 1)]
    inside = [mark for mark in (*breaks, *marks) if low < mark < high]
    # Of two marks that nearly coincide one is dropped: a piece without width has no quadrature.
    points = [low]
    for mark in sorted(inside):
        if mark - points[-1] > 1e-9 * width and high - mark > 1e-9 * width:
            points.append(mark)
    return np.array([*points, high], dtype=np.float64)


def integral(integrand: Any, splits: Array) -> float:
    """∫ by tanh-sinh quadrature, which can handle logarithmic singularities at the ends of the pieces."""
    from scipy.integrate import tanhsinh

    result = tanhsinh(integrand, splits[:-1], splits[1:], atol=1e-11, rtol=1e-9, maxlevel=7)
    return float(result.integral.sum())
