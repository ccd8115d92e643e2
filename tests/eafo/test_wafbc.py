"""WAFBC: the entropy's maximum between two boundary values, and where the correction vanishes."""

import numpy as np
import pytest
import sympy

from crrelu_llm.eafo import density as densities
from crrelu_llm.eafo import estimates, parsing, wafbc
from crrelu_llm.eafo.correction import correct
from crrelu_llm.eafo.entropy import of_output
from crrelu_llm.errors import InputError


@pytest.mark.parametrize("text", ["normal", "logistic(1,2)", "laplace", "0.4*normal(-2,1) + 0.6*normal(1,0.5)"])
def test_its_output_is_uniform_and_every_neighbour_has_less_entropy(text):
    worst = wafbc.wafbc(parsing.density(text), -1, 2)
    assert of_output(worst, worst.density).value == pytest.approx(np.log(3), abs=1e-6)
    small, large = wafbc.losses(worst, 0.05, 6), wafbc.losses(worst, 0.5, 6)
    assert (small > 0).all() and (large > 0).all()
    # A maximum: the loss grows with the square of the distance.
    np.testing.assert_allclose(large / small, 100, rtol=0.4)


@pytest.mark.parametrize("text", ["normal(0.5,2)", "student_t(5)", "0.4*normal(-2,1) + 0.6*normal(1,0.5)"])
def test_the_correction_vanishes_there_and_nowhere_near(text):
    worst = wafbc.wafbc(parsing.density(text), 0, 5)
    t = np.linspace(-3, 3, 25)
    scale = np.abs(worst.density.derivative(t)).max()
    np.testing.assert_allclose(correct(worst, worst.density).forward(t), 0, atol=1e-12 * scale)
    for one in wafbc.perturbed(worst, 0.3, 3):
        assert np.abs(correct(one, one.density).forward(t)).max() > 1e-3 * scale
        step = 1e-5
        slope = (one.value(t + step) - one.value(t - step)) / (2 * step)
        np.testing.assert_allclose(one.derivative(t), slope, atol=1e-8)
        np.testing.assert_allclose(one.value(np.array([-1e9, 1e9])), [0, 5], atol=1e-9)


def test_the_correction_s_formula_is_0():
    worst = wafbc.wafbc(densities.normal(), -1, 2)
    (formula,) = correct(worst, worst.density).formulas
    assert formula.forward == 0


def test_the_formula():
    t = sympy.Symbol("t", real=True)
    found = wafbc.wafbc(densities.normal(), -1, 1).expression(t)
    assert sympy.simplify(found - sympy.erf(t / sympy.sqrt(2))) == 0
    assert wafbc.wafbc(estimates.from_samples(np.random.default_rng(0).normal(size=200))).expression(t) is None


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 0), (0, np.inf)])
def test_boundary_values_that_bound_nothing_are_one_line(low, high):
    with pytest.raises(InputError, match="the first below the second"):
        wafbc.wafbc(densities.normal(), low, high)
