"""Every backend against the definition: values, gradients, shapes, dtypes, extremes, and torch's transformations."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from crrelu_llm import kernels
from crrelu_llm.kernels import BACKENDS, eager

# The reference is the bare formula: what goes beyond it is promised by the others only.
ROBUST = {name: backend for name, backend in BACKENDS.items() if name != "reference"}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
robust_backend = pytest.mark.parametrize("backend", ROBUST.values(), ids=ROBUST)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(9, 41, 341), (1, 1, 1023), (7,), (0, 5), (3, 0), (4, 1)]


def _input(shape, dtype=torch.float64, scale=1.5):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def _epsilon(size, dtype=torch.float64):
    # Multiples of 1/16 are exact in every dtype, so that all of them see the same ε.
    return ((torch.arange(size) % 16 - 5) / 16).to(dtype)


def _evaluate(backend, x, epsilon, grad_output):
    """Value, gradient of x and gradient of ε, detached."""
    x, epsilon = x.detach().requires_grad_(), epsilon.detach().requires_grad_()
    y = backend(x, epsilon)
    y.backward(grad_output)
    return y.detach(), x.grad, epsilon.grad


def _derivatives(x, epsilon):
    """The closed forms of DESIGN: f, f', ∂f/∂ε in Python floats."""
    bell = math.exp(-x * x / 2)
    return max(0.0, x) + epsilon * x * bell, float(x > 0) + epsilon * (1 - x * x) * bell, x * bell


@every_backend
@pytest.mark.parametrize("epsilon", [0.01, -0.7, 0.0])
def test_values_and_derivatives_are_those_of_the_closed_form(backend, epsilon):
    points = [-7.5, -2.0, -1.0, -0.3, 0.0, 1e-9, 0.4, 1.0, 1.7, 6.0]
    x = torch.tensor(points, dtype=torch.float64)
    per_point = torch.full_like(x, epsilon)
    expected = torch.tensor([_derivatives(point, epsilon) for point in points], dtype=torch.float64)
    result = torch.stack(_evaluate(backend, x, per_point, torch.ones_like(x)), dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-15)


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_first_and_second_gradients_of_x_and_epsilon(backend, size):
    x = _input((3, 5)).requires_grad_()
    epsilon = _epsilon(size).requires_grad_()
    assert torch.autograd.gradcheck(backend, (x, epsilon))
    assert torch.autograd.gradgradcheck(backend, (x, epsilon))


@robust_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_odd_shapes_agree_with_the_definition(backend, shape, per_channel):
    x, epsilon = _input(shape), _epsilon(shape[-1] if per_channel else 1)
    grad_output = torch.cos(x)
    expected = _evaluate(BACKENDS["reference"], x, epsilon, grad_output)
    result = _evaluate(backend, x, epsilon, grad_output)
    assert [t.shape for t in result] == [x.shape, x.shape, epsilon.shape]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@every_backend
def test_a_scalar_stays_a_scalar(backend):
    x, epsilon = torch.tensor(0.5, dtype=torch.float64), _epsilon(1)
    result = _evaluate(backend, x, epsilon, torch.ones_like(x))
    assert [t.shape for t in result] == [(), (), (1,)]
    assert [t.item() for t in result] == pytest.approx(_derivatives(0.5, epsilon.item()), rel=1e-14)


@robust_backend
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 2), lambda x: x[:, ::2, 1::3], lambda x: x[:1].expand(4, 6, 8), lambda x: x.flip(2)],
    ids=["transposed", "strided", "expanded", "flipped"],
)
def test_views_agree_with_contiguous_input(backend, view):
    x = view(_input((5, 6, 8), torch.float32))
    epsilon = _epsilon(x.shape[-1], torch.float32)
    grad_output = view(torch.cos(_input((5, 6, 8), torch.float32)))
    expected = _evaluate(backend, x.contiguous(), epsilon, grad_output.contiguous())
    torch.testing.assert_close(_evaluate(backend, x, epsilon, grad_output), expected, rtol=1e-6, atol=1e-6)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 64])
def test_error_is_below_twice_that_of_the_plain_formula(backend, dtype, size):
    """Liger-Kernel's criterion, for the value and both gradients: 2 × the plain formula's error in the same dtype."""
    x, epsilon = _input((64, 64), dtype, scale=2.5), _epsilon(size, torch.float32)
    grad_output = torch.cos(3 * x.double()).to(dtype)
    truth = _evaluate(BACKENDS["reference"], x.double(), epsilon.double(), grad_output.double())
    plain = _evaluate(BACKENDS["reference"], x, epsilon, grad_output)
    result = _evaluate(backend, x, epsilon, grad_output)
    assert [t.dtype for t in result] == [dtype, dtype, torch.float32]
    for ours, theirs, exact in zip(result, plain, truth, strict=True):
        one_ulp = torch.finfo(ours.dtype).eps * exact.abs().max()
        error, plain_error = (ours - exact).abs(), (theirs - exact).abs()
        assert error.max() <= 2 * plain_error.max() + one_ulp
        assert error.mean() <= 2 * plain_error.mean() + one_ulp


@robust_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_results_are_the_exact_ones_rounded(backend, dtype):
    x, epsilon = _input((64, 64), dtype, scale=2.5), _epsilon(64, torch.float32)
    grad_output = torch.cos(3 * x.double()).to(dtype)
    truth = _evaluate(BACKENDS["reference"], x.double(), epsilon.double(), grad_output.double())
    value, grad_x, grad_epsilon = _evaluate(backend, x, epsilon, grad_output)
    for ours, exact in [(value, truth[0]), (grad_x, truth[1])]:
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(grad_epsilon.double(), truth[2], rtol=1e-5, atol=1e-5)


@robust_backend
def test_gradient_of_epsilon_is_summed_in_float32(backend):
    """A running sum in bfloat16 would stall at 256; here the exact sum is 8192 · exp(−1/2)."""
    x = torch.ones(8192, 1, dtype=torch.bfloat16)
    for epsilon in (torch.tensor([0.25]), torch.tensor([0.25], dtype=torch.bfloat16)):
        grad_epsilon = _evaluate(backend, x, epsilon, torch.ones_like(x))[2]
        assert grad_epsilon.dtype == epsilon.dtype
        assert grad_epsilon.item() == pytest.approx(8192 * math.exp(-0.5), rel=torch.finfo(epsilon.dtype).eps)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_infinity_nan_and_the_ends_of_the_range(backend, dtype):
    epsilon, largest, smallest = 0.25, torch.finfo(dtype).max, torch.finfo(dtype).tiny
    table = [  # x, f(x), f'(x), ∂f/∂ε
        (0.0, 0.0, epsilon, 0.0),
        (-0.0, 0.0, epsilon, 0.0),
        (smallest, 1.25 * smallest, 1.25, smallest),
        (-smallest, -0.25 * smallest, 0.25, -smallest),
        (256.0, 256.0, 1.0, 0.0),
        (-256.0, 0.0, 0.0, 0.0),
        (largest, largest, 1.0, 0.0),
        (-largest, 0.0, 0.0, 0.0),
        (math.inf, math.inf, 1.0, 0.0),
        (-math.inf, 0.0, 0.0, 0.0),
        (math.nan, math.nan, math.nan, math.nan),
    ]
    x, *expected = torch.tensor(table, dtype=torch.float64).T
    per_entry = torch.full((len(table),), epsilon, dtype=torch.promote_types(dtype, torch.float32))
    result = _evaluate(backend, x.to(dtype), per_entry, torch.ones_like(x, dtype=dtype))
    for ours, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0, equal_nan=True)


@robust_backend
def test_nan_reaches_both_gradients_even_where_epsilon_is_zero(backend):
    x, epsilon = torch.tensor([1.0, math.nan]), torch.zeros(1)
    _, grad_x, grad_epsilon = _evaluate(backend, x, epsilon, torch.ones(2))
    assert grad_x.isnan().tolist() == [False, True]
    assert grad_epsilon.isnan().all()


@robust_backend
def test_second_derivatives_are_finite_at_infinity(backend):
    x = torch.tensor([-math.inf, -300.0, 300.0, math.inf], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(backend(x, _epsilon(1)).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert curvature.tolist() == [0.0] * 4


def test_the_reference_is_nan_at_infinity_as_documented():
    x = torch.tensor([-math.inf, 300.0, math.inf])
    value, slope, _ = _evaluate(BACKENDS["reference"], x, _epsilon(1), torch.ones_like(x))
    assert value.isnan().tolist() == slope.isnan().tolist() == [True, False, True]


@robust_backend
def test_only_x_and_epsilon_are_saved(backend):
    x, epsilon = _input((8, 16), torch.bfloat16).requires_grad_(), _epsilon(16, torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        backend(x, epsilon)
    assert sorted(t.data_ptr() for t in saved) == sorted([x.data_ptr(), epsilon.data_ptr()])


@every_backend
def test_frozen_inputs_get_no_gradient(backend):
    x, epsilon = _input((4, 6)), _epsilon(6)
    both = _evaluate(backend, x, epsilon, torch.ones_like(x))
    for trained, expected in ((x.clone(), both[1]), (epsilon.clone(), both[2])):
        trained.requires_grad_()
        y = backend(trained, epsilon) if trained.shape == x.shape else backend(x, trained)
        y.sum().backward()
        torch.testing.assert_close(trained.grad, expected)
    assert x.grad is None and epsilon.grad is None
    assert not backend(x, epsilon).requires_grad


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_eager_computes_only_the_gradients_asked_for(needs):
    context = SimpleNamespace(saved_tensors=(_input((4, 6)), _epsilon(6)), needs_input_grad=needs)
    gradients = eager._CRReLUFunction.backward(context, torch.ones(4, 6))
    assert tuple(gradient is not None for gradient in gradients) == needs


@robust_backend
@pytest.mark.parametrize("size", [1, 16])
def test_compiles_as_one_graph(backend, size):
    x, epsilon = _input((3, 4, 16), torch.float32), _epsilon(size, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(backend, fullgraph=True, backend="aot_eager")
    expected = _evaluate(backend, x, epsilon, torch.cos(x))
    torch.testing.assert_close(_evaluate(compiled, x, epsilon, torch.cos(x)), expected)


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_per_sample_gradients_with_torch_func(backend, size):
    x, epsilon = _input((3, 2, 5)), _epsilon(size)
    gradient = torch.func.grad(lambda one, e: backend(one, e).sin().sum(), argnums=(0, 1))
    expected = [gradient(one, epsilon) for one in x]
    for in_dims, batched in ((None, epsilon), (0, epsilon.expand(3, size))):
        grad_x, grad_epsilon = torch.vmap(gradient, in_dims=(0, in_dims))(x, batched)
        torch.testing.assert_close(grad_x, torch.stack([e[0] for e in expected]))
        torch.testing.assert_close(grad_epsilon, torch.stack([e[1] for e in expected]))


@robust_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    x, epsilon = _input((4, 8), dtype), _epsilon(8, torch.float32)
    expected = _evaluate(backend, x, epsilon, torch.ones_like(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = _evaluate(backend, x, epsilon, torch.ones_like(x))
    assert result[0].dtype == dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(backend, use_reentrant):
    x, epsilon = _input((4, 8), torch.float32), _epsilon(8, torch.float32)

    def checkpointed(x, epsilon):
        return checkpoint(lambda a, e: backend(a, e).sin(), x, epsilon, use_reentrant=use_reentrant)

    expected = _evaluate(lambda a, e: backend(a, e).sin(), x, epsilon, torch.ones_like(x))
    torch.testing.assert_close(_evaluate(checkpointed, x, epsilon, torch.ones_like(x)), expected, rtol=0, atol=0)


@every_backend
@settings(deadline=None, max_examples=60)
@given(
    points=st.lists(st.floats(-1e6, 1e6) | st.floats(-4, 4), min_size=1, max_size=8),
    epsilon=st.floats(-10, 10),
)
def test_the_bump_and_its_derivative_are_bounded(backend, points, epsilon):
    x = torch.tensor(points, dtype=torch.float64)
    value, slope, _ = _evaluate(backend, x, torch.tensor([epsilon], dtype=torch.float64), torch.ones_like(x))
    rounding = 1e-14
    assert ((value - x.relu()).abs() <= 0.6066 * abs(epsilon) + rounding).all()
    low, high = sorted((-0.4463 * epsilon, epsilon))
    bump_slope = slope - (x > 0).double()
    assert ((bump_slope >= low - rounding) & (bump_slope <= high + rounding)).all()


def test_the_dispatch_agrees_with_the_definition():
    x, epsilon = _input((4, 8)), _epsilon(8)
    expected = _evaluate(BACKENDS["reference"], x, epsilon, torch.cos(x))
    torch.testing.assert_close(_evaluate(kernels.crrelu, x, epsilon, torch.cos(x)), expected)
