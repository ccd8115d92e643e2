"""The bump with a centre μ and a width σ: every backend against the closed form, in every shape and dtype."""

import contextlib
import math

import pytest
import torch
from kernel_tools import (
    BLOCK_SHAPES,
    DTYPES,
    assert_epsilon_close,
    epsilon_of,
    evaluate,
    every_backend,
    normal,
    robust_backend,
    shrink_blocks,
)

from crrelu_llm import CRReLU, crrelu
from crrelu_llm.activation import crrelu_gated
from crrelu_llm.errors import InputError
from crrelu_llm.kernels import crrelu as kernel
from crrelu_llm.kernels import crrelu_gated as gated_kernel
from crrelu_llm.kernels import crrelu_packed as packed_kernel
from crrelu_llm.kernels import reference
from crrelu_llm.kernels.recompute import recomputing


def _moments(size, dtype=torch.float64):
    # Multiples of 1/8: exact in every dtype.
    steps = torch.arange(size)
    return torch.stack([(steps % 5 - 3) / 8, (steps % 7 + 4) / 8]).to(dtype)


def _with(moments, function=kernel):
    return lambda *inputs: function(*inputs, moments)


@every_backend
@pytest.mark.parametrize(("center", "width"), [(0.0, 1.0), (-0.7, 0.4), (1.3, 2.5)])
def test_values_and_derivatives_are_those_of_the_closed_form(backend, center, width):
    points, epsilon = [-7.5, -2.0, -1.0, -0.3, 0.0, 1e-9, 0.4, 1.0, 1.7, 6.0], -0.7
    x = torch.tensor(points, dtype=torch.float64)
    expected = []
    for point in points:
        t = (point - center) / width
        bell = math.exp(-t * t / 2)
        value = max(0.0, point) + epsilon * (point - center) * bell
        expected.append((value, float(point > 0) + epsilon * (1 - t * t) * bell, (point - center) * bell))
    moments = torch.tensor([[center], [width]], dtype=torch.float64).expand(2, len(points))
    result = evaluate(_with(moments), x, torch.full_like(x, epsilon), grad=torch.ones_like(x))
    torch.testing.assert_close(
        torch.stack(result, dim=1), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14
    )


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_first_and_second_gradients(backend, size):
    x, epsilon, moments = normal((3, 5)).requires_grad_(), epsilon_of(size).requires_grad_(), _moments(size)
    assert torch.autograd.gradcheck(_with(moments), (x, epsilon))
    assert torch.autograd.gradgradcheck(_with(moments), (x, epsilon))


@robust_backend
@pytest.mark.parametrize("shape", [BLOCK_SHAPES[-1], (0, 5)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_odd_shapes_gated_and_packed_agree_with_the_definition(backend, shape, per_channel, monkeypatch):
    shrink_blocks(monkeypatch)
    size = shape[-1] if per_channel else 1
    gate, up, epsilon, moments = normal(shape), normal(shape, seed=1), epsilon_of(size), _moments(size)
    grad = torch.cos(gate)
    plain = evaluate(_with(moments, reference.crrelu), gate, epsilon, grad=grad)
    torch.testing.assert_close(evaluate(_with(moments), gate, epsilon, grad=grad), plain, rtol=1e-12, atol=1e-12)
    expected = evaluate(lambda g, u, e: reference.crrelu(g, e, moments) * u, gate, up, epsilon, grad=grad)
    result = evaluate(_with(moments, gated_kernel), gate, up, epsilon, grad=grad)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    value, both, total = evaluate(_with(moments, packed_kernel), torch.cat((gate, up), -1), epsilon, grad=grad)
    torch.testing.assert_close([value, *both.chunk(2, -1), total], expected, rtol=1e-12, atol=1e-12)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_every_dtype_computes_in_float32_and_rounds_once(backend, dtype, size):
    x, epsilon, moments = normal((33, 64), dtype), epsilon_of(size, torch.float32), _moments(size, torch.float32)
    grad = torch.cos(x)
    value, grad_x, total = evaluate(_with(moments), x, epsilon, grad=grad)
    wide = (x.double(), epsilon.double())
    exact = evaluate(_with(moments.double(), reference.crrelu), *wide, grad=grad.double())
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 1e-6, "atol": 1e-6 + torch.finfo(dtype).eps / 8}
    torch.testing.assert_close((value.double(), grad_x.double()), tuple(exact[:2]), **tolerance)
    z = x.double() - moments[0].double()
    summands = (grad.double() * z * torch.exp(-0.5 * (z / moments[1].double()) ** 2)).abs()
    assert_epsilon_close(backend, dtype, total, exact[2], summands.sum(0) if size > 1 else summands.sum() + 1)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(backend, dtype):
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 60000.0, -60000.0]], dtype=dtype)
    value, grad_x, _ = evaluate(_with(_moments(1, torch.float32)), x, torch.tensor([0.5]), grad=torch.ones_like(x))
    torch.testing.assert_close(value, torch.relu(x), equal_nan=True)
    torch.testing.assert_close(grad_x[0, [0, 1, 3, 4]], torch.tensor([1, 0, 1, 0], dtype=dtype))


@robust_backend
def test_a_centre_of_0_and_a_width_of_1_are_plain_crrelu(backend):
    x, epsilon = normal((41, 23), torch.float32), epsilon_of(23, torch.float32)
    standard = torch.stack([torch.zeros(23), torch.ones(23)])
    plain = evaluate(kernel, x, epsilon, grad=torch.cos(x))
    torch.testing.assert_close(evaluate(_with(standard), x, epsilon, grad=torch.cos(x)), plain, rtol=1e-6, atol=1e-6)


def test_the_module_and_the_functions_agree_and_say_what_does_not_fit():
    module = CRReLU(num_channels=4, epsilon_init=0.3, fitted=True)
    module.center.fill_(-0.5)
    module.width.fill_(0.75)
    x, up = normal((6, 4), torch.float32), normal((6, 4), torch.float32, seed=1)
    epsilon, center, width = module.epsilon, module.center, module.width
    assert torch.equal(module(x), crrelu(x, epsilon, center, width))
    assert torch.equal(module(x, up), crrelu_gated(x, up, epsilon, center, width))
    assert set(module.state_dict()) == {"epsilon", "center", "width"}
    assert set(CRReLU().state_dict()) == {"epsilon"}
    for wrong in ({"center": center}, {"center": torch.zeros(3), "width": torch.ones(3)}):
        with pytest.raises(InputError, match="give center and width both, or neither"):
            crrelu(x, epsilon, **wrong)


def test_moments_may_move_between_the_passes_and_recomputing_gives_the_same_gradients():
    def gradients(within):
        module = CRReLU(epsilon_init=0.3, fitted=True)
        module.center.fill_(-0.5)
        x = normal((9, 5), torch.float32).requires_grad_()
        weight = normal((5, 3), torch.float32, seed=2).requires_grad_()
        with within():
            y = module(x * 1.0) @ weight
        module.center.fill_(5.0)
        y.square().sum().backward()
        return x.grad, weight.grad, module.epsilon.grad

    for plain, recomputed in zip(gradients(contextlib.nullcontext), gradients(recomputing), strict=True):
        assert torch.equal(plain, recomputed)
