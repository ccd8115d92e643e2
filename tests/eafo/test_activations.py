"""Scalar activations: torch's values, autograd's derivatives, sympy's formulas."""

import numpy as np
import pytest
import sympy
import torch

from crrelu_llm.activation import CRReLU
from crrelu_llm.eafo import activations
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU

X = np.array([-6.1, -2.0, -0.7, -1e-3, 0.2, 1.0, 2.9, 7.0])


@pytest.mark.parametrize("name", activations.NAMES)
def test_the_formula_and_its_derivatives_are_the_function_s(name):
    activation, t = activations.named(name), sympy.Symbol("t", real=True)
    for low, high, formula in activation.pieces(t):
        inside = X[(float(low) < X) & (float(high) > X)]
        for found, expected in (
            (activation.value(inside), formula),
            (activation.derivative(inside), sympy.diff(formula, t)),
            (activation.second(inside), sympy.diff(formula, t, 2)),
        ):
            values = [float(expected.subs(t, sympy.Float(x, 40)).evalf(20)) for x in inside]
            np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12)


def test_crrelu_is_the_package_s():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    plain, fitted = CRReLU().double(), FittedCRReLU().double()
    with torch.no_grad():
        for value, number in ((plain.epsilon, 0.7), (fitted.epsilon, 0.7), (fitted.center, -0.3), (fitted.width, 0.8)):
            value.fill_(number)  # in float64, which their start values are not
        for name, activation in (("crrelu(0.7)", plain), ("crrelu(0.7,-0.3,0.8)", fitted)):
            np.testing.assert_allclose(activations.named(name).value(x.numpy()), activation(x), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x > 0).double(), "has no derivative"),
        (lambda x: x.relu() + x.sign(), r"jumps at -\d"),
        (lambda x: x.sqrt(), "not finite at -10"),
        (lambda x: x.sum(), "must be elementwise"),
        (np.tanh, r"cannot be computed \(RuntimeError"),
        (lambda x: 1.0, "cannot be computed"),
    ],
)
def test_what_has_no_derivative_is_one_line(function, message):
    with pytest.raises(InputError, match=message):
        activations.custom(function, "mine")


@pytest.mark.parametrize("text", ["rrelu", "crrelu(a)", "crrelu(1,2,3,4)", "crrelu(nan)", "crrelu(1,0,0)", ""])
def test_unknown_names_are_one_line(text):
    with pytest.raises(InputError, match=r"no activation|cannot be read|finite numbers, and a width above 0"):
        activations.named(text)
