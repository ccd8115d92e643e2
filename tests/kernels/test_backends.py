"""Every backend against the definition: values, gradients, shapes, dtypes, extremes, and torch's transformations."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_tools import (
    BLOCK_SHAPES,
    DTYPES,
    assert_epsilon_close,
    assert_error_is_below_twice,
    assert_gradients,
    bump,
    epsilon_of,
    evaluate,
    every_backend,
    normal,
    robust_backend,
    shrink_blocks,
)
from torch.utils.checkpoint import checkpoint

from crrelu_llm.kernels import crrelu, reference

SHAPES = [(9, 41, 341), (1, 1, 1023), (7,), (0, 5), (3, 0), (4, 1), (3, 2, 7)]


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
    result = torch.stack(evaluate(crrelu, x, per_point, grad=torch.ones_like(x)), dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-15)


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_first_and_second_gradients_of_x_and_epsilon(backend, size):
    x = normal((3, 5)).requires_grad_()
    epsilon = epsilon_of(size).requires_grad_()
    assert_gradients(backend, crrelu, (x, epsilon))


@robust_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_odd_shapes_agree_with_the_definition(backend, shape, per_channel):
    x, epsilon = normal(shape), epsilon_of(shape[-1] if per_channel else 1)
    grad_output = torch.cos(x)
    expected = evaluate(reference.crrelu, x, epsilon, grad=grad_output)
    result = evaluate(crrelu, x, epsilon, grad=grad_output)
    assert [t.shape for t in result] == [x.shape, x.shape, epsilon.shape]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@robust_backend
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_several_blocks_agree_with_the_definition(backend, shape, per_channel, monkeypatch):
    shrink_blocks(monkeypatch)
    x, epsilon = normal(shape), epsilon_of(shape[-1] if per_channel else 1)
    expected = evaluate(reference.crrelu, x, epsilon, grad=torch.cos(x))
    torch.testing.assert_close(evaluate(crrelu, x, epsilon, grad=torch.cos(x)), expected, rtol=1e-12, atol=1e-12)


@every_backend
def test_a_scalar_stays_a_scalar(backend):
    x, epsilon = torch.tensor(0.5, dtype=torch.float64), epsilon_of(1)
    result = evaluate(crrelu, x, epsilon, grad=torch.ones_like(x))
    assert [t.shape for t in result] == [(), (), (1,)]
    assert [t.item() for t in result] == pytest.approx(_derivatives(0.5, epsilon.item()), rel=1e-14)


@robust_backend
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 2), lambda x: x[:, ::2, 1::3], lambda x: x[:1].expand(4, 6, 8), lambda x: x.flip(2)],
    ids=["transposed", "strided", "expanded", "flipped"],
)
def test_views_agree_with_contiguous_input(backend, view):
    x = view(normal((5, 6, 8), torch.float32))
    epsilon = epsilon_of(x.shape[-1], torch.float32)
    grad_output = view(torch.cos(normal((5, 6, 8), torch.float32)))
    expected = evaluate(crrelu, x.contiguous(), epsilon, grad=grad_output.contiguous())
    torch.testing.assert_close(evaluate(crrelu, x, epsilon, grad=grad_output), expected, rtol=1e-6, atol=1e-6)


@robust_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 64])
def test_error_is_below_twice_that_of_the_plain_formula(backend, dtype, size):
    x, epsilon = normal((64, 64), dtype, scale=2.5), epsilon_of(size, torch.float32)
    grad_output = torch.cos(3 * x.double()).to(dtype)
    truth = evaluate(reference.crrelu, x.double(), epsilon.double(), grad=grad_output.double())
    plain = evaluate(reference.crrelu, x, epsilon, grad=grad_output)
    result = evaluate(crrelu, x, epsilon, grad=grad_output)
    assert [t.dtype for t in result] == [dtype, dtype, torch.float32]
    # The plain formula adds up pairwise, the compiled loop one after the other.
    summands = (grad_output.double() * bump(x)).abs().sum() if backend == "inductor" else truth[2]
    assert_error_is_below_twice(result, plain, truth, summands)


@robust_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_results_are_the_exact_ones_rounded(backend, dtype):
    x, epsilon = normal((64, 64), dtype, scale=2.5), epsilon_of(64, torch.float32)
    grad_output = torch.cos(3 * x.double()).to(dtype)
    truth = evaluate(reference.crrelu, x.double(), epsilon.double(), grad=grad_output.double())
    value, grad_x, grad_epsilon = evaluate(crrelu, x, epsilon, grad=grad_output)
    for ours, exact in [(value, truth[0]), (grad_x, truth[1])]:
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    summands = (grad_output.double() * bump(x)).abs().sum(0)
    assert_epsilon_close(backend, dtype, grad_epsilon, truth[2], summands)


@robust_backend
def test_gradient_of_epsilon_is_summed_in_float32(backend):
    """A running sum in bfloat16 would stall at 256; here the exact sum is 8192 · exp(−1/2)."""
    x = torch.ones(8192, 1, dtype=torch.bfloat16)
    for epsilon in (torch.tensor([0.25]), torch.tensor([0.25], dtype=torch.bfloat16)):
        grad_epsilon = evaluate(crrelu, x, epsilon, grad=torch.ones_like(x))[2]
        assert grad_epsilon.dtype == epsilon.dtype
        short_series = backend == "inductor" and epsilon.dtype == torch.float32
        rel = 1e-4 if short_series else torch.finfo(epsilon.dtype).eps
        assert grad_epsilon.item() == pytest.approx(8192 * math.exp(-0.5), rel=rel)


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
    # Triton's interpreter flushes subnormal numbers where it converts to bfloat16.
    flushed = smallest if (backend, dtype) == ("triton", torch.bfloat16) else 0
    for rows in (1, 8):
        several = x.to(dtype).expand(rows, -1)
        value, grad_x, grad_epsilon = evaluate(crrelu, several, per_entry, grad=torch.ones_like(several))
        for ours, exact in zip((value[-1], grad_x[-1], grad_epsilon / rows), expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=flushed, equal_nan=True)


@robust_backend
def test_nan_reaches_both_gradients_even_where_epsilon_is_zero(backend):
    x, epsilon = torch.tensor([1.0, math.nan]), torch.zeros(1)
    _, grad_x, grad_epsilon = evaluate(crrelu, x, epsilon, grad=torch.ones(2))
    assert grad_x.isnan().tolist() == [False, True]
    assert grad_epsilon.isnan().all()


@robust_backend
def test_second_derivatives_are_finite_at_infinity(backend):
    x = torch.tensor([-math.inf, -300.0, 300.0, math.inf], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(crrelu(x, epsilon_of(1)).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert curvature.tolist() == [0.0] * 4


def test_the_reference_is_nan_at_infinity_as_documented():
    x = torch.tensor([-math.inf, 300.0, math.inf])
    value, slope, _ = evaluate(reference.crrelu, x, epsilon_of(1), grad=torch.ones_like(x))
    assert value.isnan().tolist() == slope.isnan().tolist() == [True, False, True]


@robust_backend
def test_only_x_and_epsilon_are_saved(backend):
    x, epsilon = normal((8, 16), torch.bfloat16).requires_grad_(), epsilon_of(16, torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        crrelu(x, epsilon)
    assert sorted(t.data_ptr() for t in saved) == sorted([x.data_ptr(), epsilon.data_ptr()])


@every_backend
def test_frozen_inputs_get_no_gradient(backend):
    x, epsilon = normal((4, 6)), epsilon_of(6)
    both = evaluate(crrelu, x, epsilon, grad=torch.ones_like(x))
    for trained, expected in ((x.clone(), both[1]), (epsilon.clone(), both[2])):
        trained.requires_grad_()
        y = crrelu(trained, epsilon) if trained.shape == x.shape else crrelu(x, trained)
        y.sum().backward()
        torch.testing.assert_close(trained.grad, expected)
    assert x.grad is None and epsilon.grad is None
    assert not crrelu(x, epsilon).requires_grad


@robust_backend
@pytest.mark.parametrize("size", [1, 16])
def test_compiles_as_one_graph(backend, size):
    x, epsilon = normal((3, 4, 16), torch.float32), epsilon_of(size, torch.float32)
    compiled = torch.compile(lambda *inputs: crrelu(*inputs), fullgraph=True, backend="aot_eager")
    expected = evaluate(crrelu, x, epsilon, grad=torch.cos(x))
    torch.testing.assert_close(evaluate(compiled, x, epsilon, grad=torch.cos(x)), expected)


@every_backend
@pytest.mark.parametrize("size", [1, 5])
def test_per_sample_gradients_with_torch_func(backend, size):
    x, epsilon = normal((3, 2, 5)), epsilon_of(size)
    gradient = torch.func.grad(lambda one, e: crrelu(one, e).sin().sum(), argnums=(0, 1))
    expected = [gradient(one, epsilon) for one in x]
    for in_dims, batched in ((None, epsilon), (0, epsilon.expand(3, size))):
        grad_x, grad_epsilon = torch.vmap(gradient, in_dims=(0, in_dims))(x, batched)
        torch.testing.assert_close(grad_x, torch.stack([e[0] for e in expected]))
        torch.testing.assert_close(grad_epsilon, torch.stack([e[1] for e in expected]))


@robust_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    x, epsilon = normal((4, 8), dtype), epsilon_of(8, torch.float32)
    expected = evaluate(crrelu, x, epsilon, grad=torch.ones_like(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = evaluate(crrelu, x, epsilon, grad=torch.ones_like(x))
    assert result[0].dtype == dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(backend, use_reentrant):
    x, epsilon = normal((4, 8), torch.float32), epsilon_of(8, torch.float32)

    def checkpointed(x, epsilon):
        return checkpoint(lambda a, e: crrelu(a, e).sin(), x, epsilon, use_reentrant=use_reentrant)

    expected = evaluate(lambda a, e: crrelu(a, e).sin(), x, epsilon, grad=torch.ones_like(x))
    torch.testing.assert_close(evaluate(checkpointed, x, epsilon, grad=torch.ones_like(x)), expected, rtol=0, atol=0)


@every_backend
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    points=st.lists(st.floats(-1e6, 1e6) | st.floats(-4, 4), min_size=1, max_size=8),
    epsilon=st.floats(-10, 10),
)
def test_the_bump_and_its_derivative_are_bounded(backend, points, epsilon):
    x = torch.tensor(points, dtype=torch.float64)
    value, slope, _ = evaluate(crrelu, x, torch.tensor([epsilon], dtype=torch.float64), grad=torch.ones_like(x))
    rounding = 1e-14
    assert ((value - x.relu()).abs() <= 0.6066 * abs(epsilon) + rounding).all()
    low, high = sorted((-0.4463 * epsilon, epsilon))
    bump_slope = slope - (x > 0).double()
    assert ((bump_slope >= low - rounding) & (bump_slope <= high + rounding)).all()
