"""Densities: closed forms against numerical ones, samples, and what is no density."""

import numpy as np
import pytest
from scipy.integrate import quad

from crrelu_llm.eafo import density as densities
from crrelu_llm.eafo import estimates, parsing
from crrelu_llm.errors import InputError

TEXTS = (
    "normal", "normal(0.5,2)", "normal(mean=-1,std=0.3)", "logistic(1,0.5)", "laplace(-1,2)", "student_t(3)",
    "student_t(df=8,loc=1,scale=2)", "0.3*normal(-1,1) + 0.7*laplace(0,2)",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_density_is_one_and_its_functions_agree(text):
    density = parsing.density(text)
    assert quad(lambda x: float(density.pdf(x)), -np.inf, np.inf, limit=200)[0] == pytest.approx(1, abs=1e-6)
    x = np.linspace(-4.03, 4.03, 24)
    step = 1e-5
    numeric = (density.pdf(x + step) - density.pdf(x - step)) / (2 * step)
    np.testing.assert_allclose(density.derivative(x), numeric, atol=1e-7)
    np.testing.assert_allclose(density.log_derivative(x), numeric / density.pdf(x), rtol=1e-5, atol=1e-7)
    below = [quad(lambda t: float(density.pdf(t)), -np.inf, end, limit=200)[0] for end in x[::6]]
    np.testing.assert_allclose(density.cdf(x[::6]), below, atol=1e-6)
    q = np.array([1e-9, 0.03, 0.5, 0.99])
    np.testing.assert_allclose(density.cdf(density.quantile(q)), q, rtol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_the_formula_is_the_function(text):
    import sympy

    density, t = parsing.density(text), sympy.Symbol("t", real=True)
    formula = density.expression(t)
    for x in (-2.3, 0.1, 1.7):
        assert float(formula.subs(t, x)) == pytest.approx(float(density.pdf(x)), rel=1e-12)


def test_moments_are_those_of_samples():
    rng = np.random.default_rng(0)
    mixture = parsing.density("0.3*normal(-1,1) + 0.7*normal(2,0.5)")
    samples = np.where(rng.random(200_000) < 0.3, rng.normal(-1, 1, 200_000), rng.normal(2, 0.5, 200_000))
    assert mixture.mean == pytest.approx(samples.mean(), abs=0.02)
    assert mixture.std == pytest.approx(samples.std(), abs=0.02)


def test_a_mixture_without_a_mean():
    density = parsing.density("0.5*student_t(1) + 0.5*normal")
    assert np.isnan(density.mean) and density.std == np.inf
    assert density.center == pytest.approx(0, abs=1e-6) and 1 < density.spread < 2


def test_a_smooth_density_from_samples_nears_the_true_one():
    samples = np.random.default_rng(0).normal(0.7, 1.5, 50_000)
    smooth, true = estimates.from_samples(samples), densities.normal(0.7, 1.5)
    x = np.linspace(-4, 5, 50)
    np.testing.assert_allclose(smooth.pdf(x), true.pdf(x), atol=0.01)
    np.testing.assert_allclose(smooth.derivative(x), true.derivative(x), atol=0.04)
    np.testing.assert_allclose(smooth.cdf(x), true.cdf(x), atol=0.01)
    assert smooth.mean == pytest.approx(samples.mean())
    assert smooth.std == pytest.approx(1.5, abs=0.03)


def test_binning_the_samples_changes_next_to_nothing():
    from scipy.stats import gaussian_kde

    samples = np.random.default_rng(1).standard_t(5, 300)
    exact = gaussian_kde(samples, bw_method=0.3 / samples.std(ddof=1))
    x = np.linspace(-4, 4, 40)
    np.testing.assert_allclose(estimates.from_samples(samples, bandwidth=0.3).pdf(x), exact(x), rtol=0.01, atol=1e-4)


def test_any_function_that_is_a_density():
    triangle = estimates.from_function(lambda x: 1 - np.abs(x), -1, 1)
    assert (triangle.mean, triangle.std) == (pytest.approx(0, abs=1e-9), pytest.approx(6**-0.5))
    np.testing.assert_allclose(triangle.cdf([-1, -0.5, 0, 0.5, 1, 3]), [0, 0.125, 0.5, 0.875, 1, 1], atol=1e-7)
    np.testing.assert_allclose(triangle.derivative([-0.5, 0.3]), [1, -1], atol=1e-8)
    quartic = estimates.from_function(lambda x: np.exp(-(x**4)) / 1.8128049541109541, -np.inf, np.inf)
    assert float(quartic.cdf(0.0)) == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: densities.normal(0, 0), "must be above 0"),
        (lambda: densities.laplace(np.nan), "must be finite"),
        (lambda: densities.student_t(-2), "must be above 0"),
        (lambda: parsing.density("0.5*normal + -0.5*laplace"), "negative somewhere"),
        (lambda: parsing.density("0.5*normal + 0.2*laplace"), r"sum to 0\.7"),
        (lambda: parsing.density("cauchy"), r"no density 'cauchy' \(normal, "),
        (lambda: parsing.density("normal(1,2"), "cannot be read; write NAME"),
        (lambda: parsing.density("normal(a)"), "'a' is not a number"),
        (lambda: parsing.density("normal(1,2,3)"), "normal takes from 0 to 2"),
        (lambda: parsing.density("samples:/nowhere/x.npy"), "cannot be read"),
        (lambda: densities.normal(1e200, 1), "does not resolve"),
        (lambda: estimates.from_samples(["a"] * 200), "give real numbers"),
        (lambda: estimates.from_function(lambda x: 1 / np.pi / (1 + x * x), -np.inf, np.inf), "does not exist; E"),
        (lambda: estimates.from_samples(np.zeros(5)), "5 samples are too few; give at least 100"),
        (lambda: estimates.from_samples(np.full(500, 2.0)), "all 500 samples are 2, a constant"),
        (lambda: estimates.from_samples([*range(200), np.nan]), "1 of 201 samples are NaN"),
        (lambda: estimates.from_samples(np.arange(200), bandwidth=-1), "bandwidth of -1"),
        (lambda: estimates.from_function(np.sin, -3, 3), "is -1 at .* nowhere negative"),
        (lambda: estimates.from_function(lambda x: 0 * x + 1, 0, 3), "integrates to 3; divide it by that"),
        (lambda: estimates.from_function(lambda x: 1 / (1 + np.abs(x)), -np.inf, np.inf), "does not exist"),
        (lambda: estimates.from_function(lambda x: x, 1, 0), "is empty"),
    ],
)  # fmt: skip
def test_what_is_no_density_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_samples_from_files(tmp_path):
    samples = np.random.default_rng(0).normal(size=(40, 5))
    np.save(tmp_path / "x.npy", samples)
    np.savetxt(tmp_path / "x.txt", samples)
    found = [parsing.density(f"samples:{tmp_path / name}") for name in ("x.npy", "x.txt")]
    assert [density.mean for density in found] == pytest.approx([samples.mean()] * 2)
