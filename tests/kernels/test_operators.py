"""CRReLU as torch operators: torch's own checks of them, and what torch does with operators."""

import pytest
import torch
from kernel_tools import epsilon_of, evaluate, normal
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from crrelu_llm.kernels import crrelu, crrelu_gated, crrelu_packed, formula

OPS = torch.ops.crrelu_llm
NAMES = ["crrelu", "crrelu_gated", "crrelu_packed"]
every_operator = pytest.mark.parametrize("name", NAMES)
per_layer_and_channel = pytest.mark.parametrize("size", [1, 6], ids=["layer", "channel"])
aot = {"fullgraph": True, "backend": "aot_eager"}


def _inputs(name, size=6, dtype=torch.float32):
    """Inputs of an operator whose result has the shape (2, 3, 6), and a gradient of it."""
    gate, up, epsilon = normal((2, 3, 6), dtype), normal((2, 3, 6), dtype, seed=1), epsilon_of(size, torch.float32)
    tensors = {"crrelu": (gate,), "crrelu_gated": (gate, up), "crrelu_packed": (torch.cat((gate, up), dim=-1),)}
    return (*tensors[name], epsilon), torch.cos(gate)


@every_operator
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(1, torch.float32, id="layer-torch.float32"),
        pytest.param(6, torch.bfloat16, id="channel-torch.bfloat16"),
        pytest.param(1, torch.bfloat16, id="layer-torch.bfloat16", marks=pytest.mark.slow),
        pytest.param(6, torch.float32, id="channel-torch.float32", marks=pytest.mark.slow),
    ],
)
def test_torch_finds_no_fault_with_the_operator(name, backward, size, dtype):
    inputs, grad = _inputs(name, size, dtype)
    inputs = tuple(t.requires_grad_() for t in ((grad, *inputs) if backward else inputs))
    operator = getattr(OPS, f"{name}_backward" if backward else name).default
    torch.library.opcheck(operator, inputs)


@every_operator
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_strides_are_foretold_whatever_those_of_the_input_are(name, backward):
    inputs, grad = _inputs(name)
    inputs = [t.transpose(0, 1) if t.dim() == 3 else t for t in ((grad, *inputs) if backward else inputs)]
    operator = getattr(OPS, f"{name}_backward" if backward else name).default
    torch.library.opcheck(operator, tuple(inputs), test_utils="test_faketensor")


@every_operator
@per_layer_and_channel
def test_a_call_of_the_operator_compiles_as_one_graph(name, size):
    inputs, grad = _inputs(name, size)
    operator = getattr(OPS, name)
    compiled = torch.compile(lambda *args: operator(*args).sin(), **aot)
    expected = evaluate(lambda *args: operator(*args).sin(), *inputs, grad=grad)
    torch.testing.assert_close(evaluate(compiled, *inputs, grad=grad), expected)


class _MLP(nn.Module):
    """All three functions, one after the other."""

    def __init__(self, size):
        super().__init__()
        self.gate_up, self.gate, self.up = nn.Linear(5, 12), nn.Linear(6, 6), nn.Linear(6, 6)
        self.epsilon = nn.Parameter(epsilon_of(size, torch.float32))

    def forward(self, x):
        h = crrelu_packed(self.gate_up(x), self.epsilon)
        return crrelu(crrelu_gated(self.gate(h), self.up(h), self.epsilon), self.epsilon)


def _gradients(mlp, forward, x):
    mlp.zero_grad()
    forward(x).sin().sum().backward()
    return [parameter.grad.clone() for parameter in mlp.parameters()]


def _mlp(size):
    torch.manual_seed(0)
    return _MLP(size), normal((4, 5), torch.float32)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 6], ids=["layer", "channel"])
def test_a_compiled_mlp_is_one_graph_with_the_same_gradients(size):
    mlp, x = _mlp(size)
    expected = _gradients(mlp, mlp, x)
    torch.testing.assert_close(_gradients(mlp, torch.compile(mlp, fullgraph=True), x), expected)


def test_a_compiled_mlp_has_plain_operations_for_the_compiler_to_fuse():
    mlp, x = _mlp(6)
    graphs = []
    torch.compile(mlp, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(x)
    assert len(graphs) == 1
    assert "torch.exp" in graphs[0].code
    assert "crrelu_llm" not in graphs[0].code


def test_an_exported_mlp_gives_the_same_values():
    mlp, x = _mlp(6)
    torch.testing.assert_close(torch.export.export(mlp, (x,)).module()(x), mlp(x))


@every_operator
def test_a_traced_function_calls_the_operator(name):
    inputs, _ = _inputs(name)
    function = {"crrelu": crrelu, "crrelu_gated": crrelu_gated, "crrelu_packed": crrelu_packed}[name]
    traced = make_fx(lambda *args: function(*args))(*inputs)
    assert f"crrelu_llm.{name}.default" in traced.code
    torch.testing.assert_close(traced(*inputs), function(*inputs))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_give_shapes_and_dtypes(name, dtype):
    inputs, grad = _inputs(name, 6, dtype)
    inputs, grad = [t.to("meta") for t in inputs], grad.to("meta").transpose(0, 1).contiguous().transpose(0, 1)
    y, *gradients = evaluate(getattr(OPS, name), *inputs, grad=grad)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 6), dtype)
    assert y.is_contiguous()
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in inputs]


@every_operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    inputs, grad = _inputs(name)
    function = lambda *args: getattr(OPS, name)(*args).sin()  # noqa: E731
    expected = evaluate(function, *inputs, grad=grad)
    checkpointed = evaluate(lambda *args: checkpoint(function, *args, use_reentrant=use_reentrant), *inputs, grad=grad)
    torch.testing.assert_close(checkpointed, expected, rtol=0, atol=0)


def test_the_second_derivative_of_the_operator_is_that_of_the_closed_form():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    epsilon = torch.tensor([0.25], dtype=torch.float64)
    (slope,) = torch.autograd.grad(OPS.crrelu(x, epsilon).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    bell = torch.exp(-x.detach().square() / 2)
    torch.testing.assert_close(curvature, 0.25 * (x.detach() ** 3 - 3 * x.detach()) * bell)


@every_operator
def test_a_penalty_on_gradients_is_that_of_the_plain_formula(name):
    inputs, _ = _inputs(name, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in inputs]

    def penalty_gradients(function):
        gradients = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    torch.testing.assert_close(penalty_gradients(getattr(OPS, name)), penalty_gradients(getattr(formula, name)))


def test_forward_mode_goes_through_the_plain_formula():
    x, epsilon = normal((5,)), epsilon_of(1)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(crrelu(forward_ad.make_dual(x, torch.ones(5)), epsilon)).tangent
    torch.testing.assert_close(tangent, evaluate(crrelu, x, epsilon, grad=torch.ones(5))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 16])
def test_without_a_gradient_the_values_are_the_same_bits(dtype, size):
    x, up, epsilon = normal((9, 16), dtype, 3), normal((9, 16), dtype, seed=1), epsilon_of(size, torch.float32)
    for function, inputs in ((crrelu, (x,)), (crrelu_gated, (x, up))):
        training = function(*(tensor.clone().requires_grad_() for tensor in inputs), epsilon)
        with torch.no_grad():
            assert torch.equal(function(*inputs, epsilon), training)


def test_an_output_may_be_changed_in_place():
    x, epsilon = normal((2, 3, 4)).requires_grad_(), epsilon_of(1)
    crrelu(x, epsilon).mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, evaluate(crrelu, x, epsilon, grad=torch.full_like(x, 2))[1])
