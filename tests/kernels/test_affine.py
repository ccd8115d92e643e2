"""The calibrated form, gain·f(scale·(x + shift)) + offset: every backend against a definition in float64."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import (
    BLOCK_SHAPES,
    DTYPES,
    assert_epsilon_close,
    assert_error_is_below_twice,
    assert_gradients,
    epsilon_of,
    evaluate,
    every_backend,
    normal,
    robust_backend,
    shrink_blocks,
)
from torch.autograd import forward_ad

from crrelu_llm import CRReLU, crrelu, kernels
from crrelu_llm.activation import crrelu_gated
from crrelu_llm.errors import InputError
from crrelu_llm.kernels import crrelu as kernel
from crrelu_llm.kernels import crrelu_gated as gated_kernel
from crrelu_llm.kernels import crrelu_packed as packed_kernel
from crrelu_llm.kernels import reference
from crrelu_llm.kernels.choice import using
from crrelu_llm.kernels.recompute import recomputing

OPS = torch.ops.crrelu_llm


def _affine(channels, dtype=torch.float64):
    """Scales and gains of both signs. Multiples of 1/8: exact in every dtype."""
    steps = torch.arange(channels)
    scale, gain = (steps % 3 * 2 - 1.5) / 2, (steps % 4 * 3 - 4) / 8
    return torch.stack([scale, (steps % 5 - 2) / 4, gain, (steps % 7 - 3) / 8]).to(dtype)


def _definition(x, epsilon, affine):
    """The formula in the dtypes that it is given, float64."""
    scale, shift, gain, offset = affine
    t = scale * (x + shift)
    return gain * (torch.relu(t) + epsilon * t * torch.exp(-t * t / 2)) + offset


def _with(affine, function=kernel):
    return lambda *inputs: function(*inputs, affine)


def _expected(affine, *inputs, grad):
    """Value and gradients of the definition, plain or gated, in float64."""

    def function(x, *rest):
        return _definition(x, rest[-1], affine.double()) * (rest[0] if len(rest) == 2 else 1)

    return evaluate(function, *(tensor.double() for tensor in inputs), grad=grad.double())


@every_backend
def test_values_and_gradients_are_those_of_the_closed_form(backend):
    x, affine = torch.linspace(-7, 7, 45, dtype=torch.float64).reshape(9, 5), _affine(5)
    scale, shift, gain, offset = affine
    t = scale * (x + shift)
    bell = torch.exp(-t * t / 2)
    value, grad_x, total = evaluate(_with(affine), x, torch.tensor([-0.75]).double(), grad=torch.ones_like(x))
    tolerance = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(value, gain * (t.clamp(min=0) - 0.75 * t * bell) + offset, **tolerance)
    torch.testing.assert_close(grad_x, gain * scale * ((t > 0).double() - 0.75 * (1 - t * t) * bell), **tolerance)
    torch.testing.assert_close(total, (gain * t * bell).sum().reshape(1), **tolerance)


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_first_and_second_gradients(backend, size):
    x, epsilon, affine = normal((3, 5)).requires_grad_(), epsilon_of(size).requires_grad_(), _affine(5)
    assert_gradients(backend, _with(affine), (x, epsilon))


def test_first_and_second_gradients_gated_and_packed():
    gate, up, epsilon, affine = normal((3, 5)), normal((3, 5), seed=1), epsilon_of(1), _affine(5)
    for function, inputs in ((gated_kernel, (gate, up)), (packed_kernel, (torch.cat((gate, up), -1),))):
        inputs = [tensor.requires_grad_() for tensor in (*inputs, epsilon)]
        assert torch.autograd.gradcheck(_with(affine, function), inputs)
        assert torch.autograd.gradgradcheck(_with(affine, function), inputs)


@robust_backend
@pytest.mark.parametrize("shape", [BLOCK_SHAPES[-1], BLOCK_SHAPES[-2], (0, 5)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", ["plain", "gated", "packed"])
def test_odd_shapes_agree_with_the_definition(backend, form, shape, per_channel, monkeypatch):
    shrink_blocks(monkeypatch)
    gate, up, affine = normal(shape), normal(shape, seed=1), _affine(shape[-1])
    epsilon, grad = epsilon_of(shape[-1] if per_channel else 1), torch.cos(gate)
    inputs = (gate, epsilon) if form == "plain" else (gate, up, epsilon)
    expected = _expected(affine, *inputs, grad=grad)
    if form == "packed":
        both = torch.cat((gate, up), -1)
        value, both, total = evaluate(_with(affine, packed_kernel), both, epsilon, grad=grad)
        result = [value, *both.chunk(2, -1), total]
    else:
        result = evaluate(_with(affine, gated_kernel if form == "gated" else kernel), *inputs, grad=grad)
    torch.testing.assert_close(list(result), list(expected), rtol=1e-12, atol=1e-12)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 64])
def test_every_dtype_computes_in_float32_and_rounds_once(backend, dtype, size):
    x, epsilon, affine = normal((33, 64), dtype), epsilon_of(size, torch.float32), _affine(64, torch.float32)
    grad = torch.cos(x)
    value, grad_x, total = evaluate(_with(affine), x, epsilon, grad=grad)
    exact = _expected(affine, x, epsilon, grad=grad)
    # Where offset and value cancel, what is left carries the error of both.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 1e-6, "atol": 2e-6 + torch.finfo(dtype).eps / 8}
    torch.testing.assert_close((value.double(), grad_x.double()), tuple(exact[:2]), **tolerance)
    scale, shift, gain, _ = affine.double()
    t = scale * (x.double() + shift)
    summands = (grad.double() * gain * t * torch.exp(-t * t / 2)).abs()
    assert_epsilon_close(backend, dtype, total, exact[2], summands.sum(0) + 1e-3 if size > 1 else summands.sum() + 1)


def test_error_in_bfloat16_is_below_twice_that_of_the_plain_formula():
    """Of the compiled loops, whose exp is a short series, as of the eager ones."""
    x, epsilon, affine = normal((64, 48), torch.bfloat16), epsilon_of(48, torch.float32), _affine(48, torch.float32)
    grad = torch.cos(3 * x)
    plain = evaluate(_with(affine, reference.crrelu), x, epsilon, grad=grad)
    exact = _expected(affine, x, epsilon, grad=grad)
    scale, shift, gain, _ = affine.double()
    t = scale * (x.double() + shift)
    summands = (grad.double() * gain * t * torch.exp(-t * t / 2)).abs().sum(0)
    for backend in ("eager", "inductor"):
        with using(backend):
            assert_error_is_below_twice(evaluate(_with(affine), x, epsilon, grad=grad), plain, exact, summands)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(backend, dtype):
    """A negative scale turns them round; offset and gain apply as to any other value."""
    row = [float("inf"), -float("inf"), float("nan"), 60000.0, -60000.0]
    x = torch.tensor([row, row[::-1]] * 4, dtype=dtype)
    affine = torch.tensor([[2.0, -0.5, 1, 1, -1], [0.5] * 5, [1, 1, 1, -0.5, 2], [0.25] * 5])
    result = evaluate(_with(affine), x, torch.full((5,), 0.5), grad=torch.ones_like(x))
    scale, shift, gain, offset = affine.to(dtype).double()
    t = scale * (x.double() + shift)
    expected = gain * torch.relu(t) + offset
    torch.testing.assert_close(result[0], expected.to(dtype), equal_nan=True)
    slope = gain * scale * (t > 0)
    torch.testing.assert_close(result[1], torch.where(x.isnan(), torch.nan, slope).to(dtype), equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 5),
    channels=st.integers(1, 9),
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES[:3]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "three", "row"]),
    far=st.sampled_from([1.0, 50.0]),
)
def test_eager_is_the_definition_whatever_the_shape_and_the_strides(
    rows, channels, per_channel, seed, dtype, layout, far
):
    def draw(*shape, number):
        return normal(shape, dtype, far, seed=seed + 1000 * number)

    def laid_out(number):
        if layout == "transposed":
            return draw(channels, rows, number=number).t()
        if layout == "sliced":
            return draw(rows, 2 * channels, number=number)[:, ::2]
        return draw(*{"three": (2, rows, channels), "row": (channels,)}.get(layout, (rows, channels)), number=number)

    gate, up = laid_out(1), laid_out(2)
    wide = torch.promote_types(dtype, torch.float32)
    affine = normal((4, channels), wide, seed=seed)
    epsilon = epsilon_of(channels if per_channel else 1, wide)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 1e-5, "atol": 1e-5 * far + torch.finfo(dtype).eps * far}
    for inputs in ((gate,), (gate, up)):
        with using("eager"):
            y = (kernel if len(inputs) == 1 else gated_kernel)(*inputs, epsilon, affine)
        expected = _definition(gate.double(), epsilon.double(), affine.double())
        expected = expected * (up.double() if len(inputs) == 2 else 1)
        assert y.dtype == dtype and y.shape == gate.shape
        assert ((y.double() - expected).abs() <= tolerance["rtol"] * expected.abs() + tolerance["atol"] * far).all()


@robust_backend
def test_ones_and_zeros_are_plain_crrelu(backend):
    x, epsilon = normal((41, 23), torch.float32), epsilon_of(23, torch.float32)
    neutral = torch.tensor([1.0, 0, 1, 0])[:, None].repeat(1, 23)
    plain = evaluate(kernel, x, epsilon, grad=torch.cos(x))
    torch.testing.assert_close(evaluate(_with(neutral), x, epsilon, grad=torch.cos(x)), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_the_values_are_the_same_bits(dtype, size):
    x, up, epsilon = normal((9, 16), dtype, 3), normal((9, 16), dtype, seed=1), epsilon_of(size, torch.float32)
    affine = _affine(16, torch.float32)
    for function, inputs in ((kernel, (x,)), (gated_kernel, (x, up))):
        training = function(*(tensor.clone().requires_grad_() for tensor in inputs), epsilon, affine)
        with torch.no_grad():
            assert torch.equal(function(*inputs, epsilon, affine), training)


@pytest.mark.parametrize("name", ["crrelu", "crrelu_gated", "crrelu_packed"])
def test_torch_finds_no_fault_with_the_operators(name):
    gate, up, epsilon = normal((3, 6), torch.float32), normal((3, 6), torch.float32, seed=1), epsilon_of(1).float()
    inputs = {"crrelu": (gate,), "crrelu_gated": (gate, up), "crrelu_packed": (torch.cat((gate, up), -1),)}[name]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, epsilon)]
    affine = _affine(6, torch.float32)
    torch.library.opcheck(getattr(OPS, name).default, (*inputs, affine))
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, (torch.cos(gate).detach(), *inputs, affine))


def test_under_torch_func_and_in_forward_mode():
    x, epsilon, affine = normal((4, 5)), epsilon_of(1), _affine(5)
    expected = evaluate(_with(affine), x, epsilon, grad=torch.ones_like(x))[1]
    by_row = torch.func.vmap(torch.func.grad(lambda row: kernel(row, epsilon, affine).sum()))(x)
    torch.testing.assert_close(by_row, expected)
    with forward_ad.dual_level():
        result = kernel(forward_ad.make_dual(x, torch.ones_like(x)), epsilon, affine)
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, expected)
    values = torch.func.vmap(torch.func.vmap(lambda value: crrelu(value, epsilon, affine[:, :1])))(x)
    torch.testing.assert_close(values, _definition(x, epsilon, affine[:, :1]))


def test_a_scalar_has_one_channel():
    x, epsilon, affine = torch.tensor(0.75).double(), epsilon_of(1), _affine(1)
    assert crrelu(x, epsilon, affine).shape == ()
    torch.testing.assert_close(crrelu(x, epsilon, affine), _definition(x, epsilon, affine).squeeze())


@pytest.mark.parametrize("gated", [False, True])
def test_a_calibrated_module_compiles_as_one_graph(gated):
    module = CRReLU(calibrated=5, epsilon_init=0.3)
    for name, row in zip(("scale", "shift", "gain", "offset"), _affine(5, torch.float32), strict=True):
        getattr(module, name).copy_(row)
    x = [normal((4, 5), torch.float32, seed=seed) for seed in range(1 + gated)]
    grad = torch.cos(x[0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = evaluate(module, *x, grad=grad)
    total = module.epsilon.grad
    module.epsilon.grad = None
    torch.testing.assert_close(evaluate(compiled, *x, grad=grad), expected)
    torch.testing.assert_close(module.epsilon.grad, total)


def test_the_module_and_the_functions_agree_and_say_what_does_not_fit():
    module = CRReLU(num_channels=4, epsilon_init=0.3, calibrated=4)
    affine = _affine(4, torch.float32)
    for name, row in zip(("scale", "shift", "gain", "offset"), affine, strict=True):
        getattr(module, name).copy_(row)
    x, up = normal((6, 4), torch.float32), normal((6, 4), torch.float32, seed=1)
    assert torch.equal(module(x), crrelu(x, module.epsilon, affine))
    assert torch.equal(module(x, up), crrelu_gated(x, up, module.epsilon, affine))
    learned = affine.clone().requires_grad_()
    crrelu(x, module.epsilon, learned).sum().backward()
    assert learned.grad is None
    for wrong, said in (
        (affine[:, :3], r"affine has shape \(4, 3\), but x of shape \(6, 4\) takes \(4, 4\)"),
        (affine[:2], r"affine has shape \(2, 4\)"),
        (affine[0], r"affine has shape \(4,\)"),
        (affine.int(), "affine must be floating point, not torch.int32"),
        ([1.0, 0, 1, 0], "affine must be a tensor"),
    ):
        for call in (lambda wrong: crrelu(x, module.epsilon, wrong), lambda w: crrelu_gated(x, up, module.epsilon, w)):
            with pytest.raises(InputError, match=said) as caught:
                call(wrong)
            assert "\n" not in str(caught.value)


def test_the_four_may_move_between_the_passes_and_recomputing_gives_the_same_gradients():
    def gradients(within):
        module = CRReLU(epsilon_init=0.3, calibrated=5)
        module.scale.fill_(-0.5)
        x = normal((9, 5), torch.float32).requires_grad_()
        weight = normal((5, 3), torch.float32, seed=2).requires_grad_()
        with within():
            y = module(x * 1.0) @ weight
        module.scale.fill_(5.0)
        y.square().sum().backward()
        return x.grad, weight.grad, module.epsilon.grad

    for plain, recomputed in zip(gradients(contextlib.nullcontext), gradients(recomputing), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_fallback_takes_the_four_along(monkeypatch):
    """The eager backend takes over with the same arguments."""

    def fail(*args):
        raise RuntimeError("broken")

    inductor = pytest.importorskip("crrelu_llm.kernels.inductor")
    monkeypatch.setattr(inductor, "unavailable", lambda device: None)
    monkeypatch.setattr(inductor, "gated_forward", fail)
    gate, up, epsilon, affine = normal((3, 5)), normal((3, 5), seed=1), epsilon_of(5), _affine(5)
    with using("inductor"):
        result = gated_kernel(gate.requires_grad_(), up, epsilon, affine)
    kernels.set_backend(None)
    torch.testing.assert_close(result, _definition(gate, epsilon, affine) * up)
