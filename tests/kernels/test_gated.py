"""The products of gated MLPs, in every backend and in the three ways of giving it gate and up."""

import math

import pytest
import torch
from kernel_tools import (
    BLOCK_SHAPES,
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

from crrelu_llm.kernels import crrelu_gated, crrelu_packed, reference

SHAPES = [(5, 2, 7), (1, 33), (9, 1), (6,), (0, 5), (3, 0), (3, 1, 9)]


def _halves(gate, up, epsilon):
    return crrelu_gated(*torch.cat((gate, up), dim=-1).chunk(2, dim=-1), epsilon)


def _packed(gate, up, epsilon):
    return crrelu_packed(torch.cat((gate, up), dim=-1), epsilon)


def _unfused(gate, up, epsilon):
    return reference.crrelu(gate, epsilon) * up


FORMS = {"separate": crrelu_gated, "halves": _halves, "packed": _packed}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Halves of one tensor are strided tensors to every backend, which the tests of values have too.
forms_apart = pytest.mark.parametrize(
    "form",
    [pytest.param(form, id=name, marks=pytest.mark.slow if name == "halves" else ()) for name, form in FORMS.items()],
)
per_layer_and_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])


def _inputs(shape, per_channel, dtype=torch.float64, scale=1.5):
    epsilon = epsilon_of(shape[-1] if per_channel else 1, torch.promote_types(dtype, torch.float32))
    return normal(shape, dtype, scale), normal(shape, dtype, seed=1), epsilon


def _assert_is_the_definition(form, shape, per_channel):
    inputs = _inputs(shape, per_channel)
    grad = torch.cos(inputs[0] + inputs[1])
    result, expected = evaluate(form, *inputs, grad=grad), evaluate(_unfused, *inputs, grad=grad)
    assert [t.shape for t in result] == [t.shape for t in expected]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@every_backend
@every_form
@per_layer_and_channel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_the_definition(backend, form, per_channel, shape):
    _assert_is_the_definition(form, shape, per_channel)


@robust_backend
@every_form
@per_layer_and_channel
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_several_blocks_agree_with_the_definition(backend, form, per_channel, shape, monkeypatch):
    shrink_blocks(monkeypatch)
    _assert_is_the_definition(form, shape, per_channel)


@every_backend
def test_a_product_of_scalars_is_a_scalar(backend):
    inputs = torch.tensor(0.5, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64), epsilon_of(1)
    result = evaluate(crrelu_gated, *inputs, grad=torch.ones_like(inputs[0]))
    assert [t.shape for t in result] == [(), (), (), (1,)]
    torch.testing.assert_close(result, evaluate(_unfused, *inputs, grad=torch.ones_like(inputs[0])))


@robust_backend
@pytest.mark.parametrize("view", [lambda t: t.transpose(0, 2), lambda t: t[:, ::2, 1::3], lambda t: t.flip(2)])
def test_views_agree_with_contiguous_input(backend, view):
    gate, up, epsilon = _inputs((5, 6, 8), per_channel=False)
    gate, up = view(gate), view(up)
    expected = evaluate(crrelu_gated, gate.contiguous(), up.contiguous(), epsilon, grad=torch.cos(gate).contiguous())
    torch.testing.assert_close(evaluate(crrelu_gated, gate, up, epsilon, grad=torch.cos(gate)), expected)


@robust_backend
@forms_apart
@per_layer_and_channel
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_error_is_below_twice_that_of_the_unfused_product(backend, form, per_channel, dtype):
    inputs = _inputs((64, 48), per_channel, dtype, scale=2.5)
    grad = torch.cos(3 * inputs[0].double()).to(dtype)
    truth = evaluate(_unfused, *(t.double() for t in inputs), grad=grad.double())
    plain = evaluate(_unfused, *inputs, grad=grad)
    result = evaluate(form, *inputs, grad=grad)
    assert [t.dtype for t in result] == [dtype, dtype, dtype, torch.float32]
    summands = (grad.double() * inputs[1].double() * bump(inputs[0])).abs().sum(0)
    assert_error_is_below_twice(result, plain, truth, summands if per_channel else summands.sum())


@robust_backend
@forms_apart
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_results_are_the_exact_ones_rounded_once(backend, form, dtype):
    inputs = _inputs((64, 48), True, dtype, scale=2.5)
    grad = torch.cos(3 * inputs[0].double()).to(dtype)
    *truth, exact_epsilon = evaluate(_unfused, *(t.double() for t in inputs), grad=grad.double())
    *result, grad_epsilon = evaluate(form, *inputs, grad=grad)
    # Half an ulp is at most half of eps; 2 % more for the rounding of float32 and the short series. Triton's
    # interpreter truncates where a GPU rounds to bfloat16.
    ulps = 1 if (backend, dtype) == ("triton", torch.bfloat16) else 0.52
    for ours, exact in zip(result, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ulps * torch.finfo(dtype).eps, atol=1e-6)
    summands = (grad.double() * inputs[1].double() * bump(inputs[0])).abs().sum(0)
    assert_epsilon_close(backend, dtype, grad_epsilon, exact_epsilon, summands)


@robust_backend
@forms_apart
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinity_and_nan_of_gate_and_up(backend, form, dtype):
    inf, nan, value_at_1 = math.inf, math.nan, 1 + 0.25 * math.exp(-0.5)
    table = [  # gate, up, value, and the derivatives by gate, up and ε
        (300.0, 3.0, 900.0, 3.0, 300.0, 0.0),
        (-300.0, 3.0, 0.0, 0.0, 0.0, 0.0),
        (20.0, 3.0, 60.0, 3.0, 20.0, 0.0),
        (inf, 2.0, inf, 2.0, inf, 0.0),
        (-inf, 2.0, 0.0, 0.0, 0.0, 0.0),
        (1.0, inf, inf, inf, value_at_1, inf),
        (nan, 2.0, nan, nan, nan, nan),
        (1.0, nan, nan, nan, value_at_1, nan),
        (0.0, 2.0, 0.0, 0.5, 0.0, 0.0),
    ]
    gate, up, *expected = torch.tensor(table, dtype=torch.float64).T
    epsilon = torch.full((len(table),), 0.25)
    for rows in (1, 8):
        several = gate.to(dtype).repeat(rows, 1), up.to(dtype).repeat(rows, 1)
        *result, grad_epsilon = evaluate(form, *several, epsilon, grad=torch.ones_like(several[0]))
        for ours, exact in zip((*(t[-1] for t in result), grad_epsilon / rows), expected, strict=True):
            rtol = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=1e-30, equal_nan=True)


@every_backend
@forms_apart
@per_layer_and_channel
def test_first_and_second_gradients(backend, form, per_channel):
    inputs = [t.requires_grad_() for t in _inputs((2, 4), per_channel)]
    assert_gradients(backend, form, inputs)


@robust_backend
@pytest.mark.parametrize("packed", [False, True])
def test_only_the_inputs_are_saved(backend, packed):
    gate, up, epsilon = _inputs((8, 16), True, torch.bfloat16)
    inputs = (torch.cat((gate, up), dim=-1), epsilon) if packed else (gate, up, epsilon)
    inputs = [t.requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (crrelu_packed if packed else crrelu_gated)(*inputs)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in inputs)


@robust_backend
@per_layer_and_channel
def test_the_packed_gradient_is_contiguous(backend, per_channel):
    gate, up, epsilon = _inputs((3, 4, 16), per_channel, torch.float32)
    gate_up = torch.cat((gate, up), dim=-1).requires_grad_()
    (grad,) = torch.autograd.grad(crrelu_packed(gate_up, epsilon).sum(), gate_up)
    assert grad.shape == gate_up.shape
    assert grad.is_contiguous()


@every_backend
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(backend, trained):
    inputs = _inputs((4, 6), True)
    expected = evaluate(crrelu_gated, *inputs, grad=torch.ones(4, 6))[1 + trained]
    inputs[trained].requires_grad_()
    crrelu_gated(*inputs).sum().backward()
    torch.testing.assert_close(inputs[trained].grad, expected)
    assert [t.grad is None for t in inputs] == [i != trained for i in range(3)]


@robust_backend
@every_form
@per_layer_and_channel
def test_compiles_as_one_graph(backend, form, per_channel):
    inputs = _inputs((3, 4, 16), per_channel, torch.float32)
    grad = torch.cos(inputs[0])
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, *inputs, grad=grad), evaluate(form, *inputs, grad=grad))


@every_backend
@every_form
def test_per_sample_gradients_with_torch_func(backend, form):
    gate, up, epsilon = _inputs((3, 2, 5), True)
    gradient = torch.func.grad(lambda *inputs: form(*inputs).sin().sum(), argnums=(0, 1, 2))
    expected = [gradient(g, u, epsilon) for g, u in zip(gate, up, strict=True)]
    result = torch.vmap(gradient, in_dims=(0, 0, None))(gate, up, epsilon)
    torch.testing.assert_close(result, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))


def _halves(base):
    return base.chunk(2, dim=-1)


def _packed_is_used(product):
    return "packed" in type(product.grad_fn).__name__


def test_the_halves_of_one_tensor_have_one_gradient():
    base = normal((4, 6), torch.float32).requires_grad_()
    epsilon = epsilon_of(1, torch.float32)
    assert _packed_is_used(crrelu_gated(*_halves(base * 1), epsilon))
    assert not _packed_is_used(crrelu_gated(*reversed(_halves(base * 1)), epsilon))


def test_halves_that_lead_elsewhere_keep_gradients_of_their_own():
    """Halves of one memory, but not of one tensor in the graph: leaves, a half cut off, a watched half."""
    epsilon, data = epsilon_of(1, torch.float32), normal((4, 6), torch.float32)
    expected = evaluate(lambda g, u: crrelu_gated(g, u, epsilon), *data.chunk(2, -1), grad=torch.ones(4, 3))
    gate, up = _halves(data.clone())
    crrelu_gated(gate.requires_grad_(), up.requires_grad_(), epsilon).sum().backward()
    torch.testing.assert_close([gate.grad, up.grad], expected[1:])

    base = data.clone().requires_grad_()
    whole = base * 1
    gate = whole[:, :3]
    with torch.no_grad():
        up = whole[:, 3:]
    crrelu_gated(gate, up, epsilon).sum().backward()
    torch.testing.assert_close(base.grad, torch.cat((expected[1], torch.zeros(4, 3)), dim=1))

    gate, up = _halves(base * 1)
    seen = []
    gate.register_hook(seen.append)
    up.retain_grad()
    crrelu_gated(gate, up, epsilon).sum().backward()
    torch.testing.assert_close([seen[0], up.grad], expected[1:])
