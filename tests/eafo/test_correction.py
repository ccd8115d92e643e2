"""The correction: the README's identities in symbols, and its effect on entropy in numbers."""

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from crrelu_llm.eafo import activations, derivation, estimates, parsing
from crrelu_llm.eafo import density as densities
from crrelu_llm.eafo.correction import correct, corrected
from crrelu_llm.eafo.entropy import of_output
from crrelu_llm.errors import InputError

STANDARD = densities.normal()


def _correct(name, text="normal"):
    return correct(activations.named(name), parsing.density(text))


class TestIdentities:
    """Each is a line of crrelu_llm/eafo/README.md."""

    x, t, e = sympy.symbols("x t epsilon", real=True)
    p, y, f, c = (sympy.Function(name) for name in "pyfc")

    def test_the_first_variation_of_the_entropy(self):
        # Euler–Lagrange of −p(y)·y′·log(p(y)·y′), in which p may be any function.
        u, v = sympy.symbols("u v", positive=True)
        integrand = -self.p(u) * v * sympy.log(self.p(u) * v)
        y = self.y(self.x)
        on = {u: y, v: y.diff(self.x)}
        variation = integrand.diff(u).subs(on).doit() - integrand.diff(v).subs(on).doit().diff(self.x)
        slope, bend = y.diff(self.x), y.diff(self.x, 2)
        p_slope = self.p(u).diff(u).subs(u, y).doit()
        assert sympy.simplify(variation - (p_slope * slope + self.p(y) * bend / slope)) == 0

    def test_the_worst_activation_solves_it(self):
        # y′·p(y) = k, so y″ = −k·p′(y)·y′/p(y)².
        p, p_slope, k = sympy.symbols("p p_slope k", positive=True)
        slope = k / p
        bend = -k * p_slope * slope / p**2
        assert sympy.simplify(p_slope * slope + p * bend / slope) == 0

    def test_from_the_inverse_to_the_forward_form(self):
        # With y = f⁻¹: y′ = 1/f′ and y″ = −f″/f′³ at x = f(t), and f + ε·c with c = −η(f)·f′.
        p, p_slope, slope, bend = sympy.symbols("p p_slope slope bend", real=True)
        eta = -(p * (-bend / slope**3) * slope + p_slope / slope)
        assert sympy.simplify(-eta * slope - (p_slope - p * bend / slope)) == 0

    def test_the_inverse_of_the_moved_activation_is_the_moved_inverse(self):
        # To first order in ε, for a concrete f: softplus moved by its correction for a logistic density.
        f, y = lambda t: sympy.log(1 + sympy.exp(t)), sympy.log(sympy.exp(self.x) - 1)
        p = sympy.exp(-self.t) / (1 + sympy.exp(-self.t)) ** 2
        c = p.diff(self.t) - p * f(self.t).diff(self.t, 2) / f(self.t).diff(self.t)
        eta = -(
            p.subs(self.t, y) * y.diff(self.x, 2) / y.diff(self.x) + p.diff(self.t).subs(self.t, y) * y.diff(self.x)
        )
        moved = y + self.e * eta
        residue = (f(moved) + self.e * c.subs(self.t, moved) - self.x).diff(self.e).subs(self.e, 0)
        for point in (0.3, 1.0, 2.5):
            assert abs(float(residue.subs(self.x, point))) < 1e-12

    @pytest.mark.parametrize("text", ["normal", "normal(0.5,2)", "logistic", "student_t(5)"])
    def test_it_vanishes_for_the_distribution_function(self, text):
        p = parsing.density(text).expression(self.t)  # f′ = p, so c = p′ − p·p′/p
        assert sympy.simplify(p.diff(self.t) - p * p.diff(self.t) / p) == 0


@pytest.mark.parametrize(
    ("name", "text", "bump", "says"),
    [
        ("relu", "normal", "t*exp(-t**2/2)", "CRReLU"),
        ("relu", "normal(0.5,2)", "(1-2*t)*exp(-(2*t-1)**2/32)", "CRReLU with centre 0.5 and width 2"),
        ("relu", "logistic", None, None),
        ("leaky_relu", "normal", "t*exp(-t**2/2)", None),
        ("relu", "laplace", "exp(-t)", None),
    ],
)
def test_the_extension_to_the_whole_line(name, text, bump, says):
    found = derivation.extension(_correct(name, text))
    assert found is not None and found.name == says
    if bump:
        assert sympy.simplify(found.bump - sympy.sympify(bump, {"t": sympy.Symbol("t", real=True)})) == 0


def test_relu_for_a_normal_density_is_crrelu_with_a_negative_epsilon():
    correction = _correct("relu")
    t = np.linspace(0.01, 5, 50)
    np.testing.assert_allclose(correction.forward(t), -t * np.exp(-t * t / 2) / np.sqrt(2 * np.pi), rtol=1e-12)
    assert derivation.extension(correction).sign == -1
    # E log f̂′ over t > 0, by the closed integral −∫₀^∞ t²·φ(t)² dt.
    assert correction.rate() == pytest.approx(-1 / (8 * np.sqrt(np.pi)), rel=1e-9)


@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("text", ["normal(0.5,2)", "laplace"])
def test_the_formulas_are_the_numbers(name, text):
    correction = _correct(name, text)
    t, x = sympy.Symbol("t", real=True), sympy.Symbol("x", real=True)
    for formula in correction.formulas:
        for point in (-2.7, -0.4, 0.3, 1.9):
            if not formula.low < point < formula.high or formula.forward is None:
                continue
            forward = float(formula.forward.subs(t, point))
            assert forward == pytest.approx(float(correction.forward(point)), rel=1e-7, abs=1e-10)
            if formula.inverse is not None:
                output = float(correction.activation.value(point))
                inverse = float(formula.inverse.subs(x, output))
                assert inverse == pytest.approx(float(correction.inverse(output)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "text"),
    [("prelu", "normal"), ("softplus", "normal(-0.5,1)"), ("tanh", "normal"), ("sigmoid", "normal(0.3,0.7)")],
)
def test_moving_along_it_lowers_the_entropy_as_fast_as_the_theory_says(name, text):
    correction = _correct(name, text)
    up, down = (of_output(corrected(correction, step), correction.density).value for step in (1e-3, -1e-3))
    assert (up - down) / 2e-3 == pytest.approx(correction.rate() + correction.boundary_rate(), rel=1e-4)
    assert correction.rate() < 0


def test_where_f_falls_the_rate_has_the_other_sign():
    rising = correct(activations.custom(lambda x: x + 0.5 * x.tanh()), STANDARD)
    falling = correct(activations.custom(lambda x: -x - 0.5 * x.tanh()), STANDARD)
    assert falling.rate() == pytest.approx(-rising.rate())
    up, down = (of_output(corrected(falling, step), STANDARD).value for step in (1e-3, -1e-3))
    assert (up - down) / 2e-3 == pytest.approx(falling.rate() + falling.boundary_rate(), rel=1e-4)


@pytest.mark.parametrize(("name", "text"), [("relu2", "normal"), ("tanh", "laplace"), ("tanh", "student_t(5)")])
def test_a_rate_that_does_not_exist_is_infinite(name, text):
    assert _correct(name, text).rate() == -np.inf


def test_at_the_end_of_a_support_the_derivative_is_that_inside():
    exponential = estimates.from_function(lambda x: np.exp(-x), 0, np.inf)
    np.testing.assert_allclose(exponential.derivative([-1.0, 0.0, 1.0]), [0, -1, -np.exp(-1)], atol=1e-3)
    assert correct(activations.named("relu"), exponential).rate() == pytest.approx(-0.5, rel=1e-4)


def test_the_sign_counts_the_boundary_and_long_numbers_do_not_stall():
    found = derivation.document(_correct("relu", "normal(-0.8123,1.2345)"))
    assert found["rate"] < 0 < found["rate"] + found["boundary_rate"]
    assert found["extension"]["sign"] == 1 and found["extension"]["bump"].startswith("(0.810045*t + 0.657999)")
    assert found["extension"]["name"] == "CRReLU with centre -0.8123 and width 1.2345"


@given(st.floats(-2, 2), st.floats(0.3, 3), st.floats(0.5, 3), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_it_moves_and_scales_with_the_density(mean, std, factor, shift):
    # For relu the correction is p′ on t > 0, whatever p is; for f(t) = a·t + b too.
    straight = activations.custom(lambda x: factor * x + shift, "straight")
    correction = correct(straight, densities.normal(mean, std))
    t = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(correction.forward(t), densities.normal(mean, std).derivative(t), rtol=1e-9, atol=1e-12)


class TestExcluded:
    def test_flat(self):
        flat = [entry for entry in _correct("relu").excluded if entry.low < entry.high]
        assert [entry.high for entry in flat] == [0.0] and "f′ = 0" in flat[0].reason
        correction = _correct("relu")
        assert np.isnan(correction.forward([-1.0])) and np.isnan(correction.inverse([-1.0, 0.0])).all()
        assert correction.applies([-1.0, 1.0]).tolist() == [False, True]

    @pytest.mark.parametrize("name", ["gelu", "silu", "mish", "crrelu(0.2)"])
    def test_not_monotone(self, name):
        correction = _correct(name)
        falls, rises = (entry for entry in correction.excluded if entry.low < entry.high)
        turn = falls.high
        assert float(correction.activation.derivative(turn)) == pytest.approx(0, abs=1e-6)
        assert rises.low == pytest.approx(turn) and -0.02 < rises.high <= 0
        assert "falls here" in falls.reason and "rises here" in rises.reason
        assert correction.applies([-5.0, turn / 2, 1.0]).tolist() == [False, False, True]
        with pytest.raises(InputError, match="has a pole"):
            corrected(correction, 0.1)

    def test_no_mass(self):
        density = estimates.from_function(lambda x: 15 / 4 * (x * (1 - np.abs(x))) ** 2 * 4, -1, 1)
        beside = estimates.from_function(lambda x: np.where(np.abs(x) > 0.5, 1.0, 0.0), -1, 1)
        assert not any("p = 0" in entry.reason for entry in correct(activations.named("tanh"), density).excluded)
        gap = [entry for entry in correct(activations.named("tanh"), beside).excluded if "p = 0" in entry.reason]
        assert (gap[0].low, gap[0].high) == (pytest.approx(-0.5, abs=0.01), pytest.approx(0.5, abs=0.01))

    def test_nothing_left(self):
        with pytest.raises(InputError, match="is flat wherever"):
            correct(activations.named("relu"), densities.normal(-40, 1))
