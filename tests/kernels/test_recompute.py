"""Activations that are computed again in the backward pass: what is kept, the same gradients, and other hooks."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from crrelu_llm import CRReLU
from crrelu_llm.kernels.choice import using
from crrelu_llm.kernels.recompute import recomputing


class MLP(nn.Module):
    """A plain or gated MLP of 8 → 24 → 8 whose forward recomputes where `recompute` is set."""

    def __init__(self, gated=False, channels=None, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 24, bias), nn.Linear(24, 8, bias)
        self.gate = nn.Linear(8, 24, bias) if gated else None
        self.act = CRReLU(channels, 0.3)
        self.recompute = False

    def forward(self, x):
        if self.recompute:
            with recomputing():
                return self.compute(x)
        return self.compute(x)

    def compute(self, x):
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x), self.up(x))
        return self.down(hidden)


def inputs():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(mlp, run=None):
    """The gradients of the input and of every parameter."""
    x = inputs()
    mlp.zero_grad()
    (mlp if run is None else run)(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in mlp.parameters())]


def kept(mlp):
    """Shapes of the tensors that a forward pass keeps beside parameters and its input, one for each memory."""
    parameters = {parameter.data_ptr() for parameter in mlp.parameters()}
    found = {}

    def pack(tensor):
        found[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    return sorted(shape for pointer, shape in found.items() if pointer not in parameters | {x.data_ptr()})


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


both = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@both
@pytest.mark.parametrize("channels", [None, 24])
def test_the_gradients_are_the_same_bit_for_bit(gated, channels):
    mlp = MLP(gated, channels)
    expected = gradients(mlp)
    mlp.recompute = True
    assert_same(gradients(mlp), expected)


@both
def test_the_output_of_the_activation_is_not_kept(gated):
    mlp = MLP(gated)
    pre_activations = [(2, 5, 24)] * (2 if gated else 1)
    assert kept(mlp) == sorted([*pre_activations, (10, 24)])  # the linear layer flattens what it keeps
    mlp.recompute = True
    assert kept(mlp) == pre_activations


@both
def test_without_a_bias_and_in_two_dimensions(gated):
    mlp = MLP(gated, bias=False)
    expected = gradients(mlp, lambda x: mlp(x.flatten(0, 1)))
    mlp.recompute = True
    assert_same(gradients(mlp, lambda x: mlp(x.flatten(0, 1))), expected)
    assert (10, 24) not in kept(mlp)


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_activation_checkpointing(gated, use_reentrant):
    mlp = MLP(gated)
    expected = gradients(mlp)
    mlp.recompute = True
    assert_same(gradients(mlp, lambda x: checkpoint(mlp, x, use_reentrant=use_reentrant)), expected)


@both
def test_hooks_outside_see_what_is_kept_and_give_it_back(gated):
    """Offloading: everything that is kept is taken away and comes back as a copy."""
    mlp = MLP(gated)
    expected = gradients(mlp)
    mlp.recompute = True

    def offloaded(x):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy
        ):
            return mlp(x)

    for ours, theirs in zip(gradients(mlp, offloaded), expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # the copies lie elsewhere, and BLAS may round differently there


def test_the_output_is_freed_after_the_forward_pass():
    mlp = MLP()
    mlp.recompute = True
    output = []
    mlp.act.register_forward_hook(lambda module, args, result: output.append(weakref.ref(result)))
    loss = mlp(inputs()).square().sum()
    assert output[0]() is None
    loss.backward()


def test_two_backward_passes_of_one_graph():
    mlp = MLP()
    mlp.recompute = True
    loss = mlp(inputs()).square().sum()
    first = torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True)
    assert_same(torch.autograd.grad(loss, list(mlp.parameters())), first)


def test_an_output_that_was_changed_in_place_is_kept_as_it_is():
    mlp = MLP()
    mlp.compute = lambda x: mlp.down(mlp.act(mlp.up(x)).mul_(2))
    expected = gradients(mlp)
    mlp.recompute = True
    assert_same(gradients(mlp), expected)


def test_an_output_in_another_order_is_kept_as_it_is():
    """What a square transpose keeps has the memory and the size of the output, but not its order."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    act = CRReLU(None, 0.3)

    def gradient():
        x = torch.linspace(-2, 2, 36).view(6, 6).requires_grad_()
        (act((x * 2).t()).t() * weight).sum().backward()
        found, weight.grad = weight.grad, None
        return found

    expected = gradient()
    for backend in ("reference", "eager"):
        with using(backend), recomputing():
            torch.testing.assert_close(gradient(), expected)


def test_a_parameter_is_kept_itself():
    """ZeRO-3 frees a parameter's memory between the passes, and brings it back under the same parameter."""
    mlp = MLP()
    expected = gradients(mlp)
    mlp.recompute = True
    loss = mlp(x := inputs()).square().sum()
    whole = mlp.down.weight.data.clone()
    mlp.down.weight.data = torch.empty(0)
    mlp.down.weight.data = whole
    mlp.zero_grad()
    loss.backward()
    assert_same([x.grad, *(parameter.grad for parameter in mlp.parameters())], expected)


def test_an_epsilon_that_is_away_while_the_next_layer_is_differentiated():
    """ZeRO-3 takes ε away after the activation's own forward pass, and brings it back for its own backward pass."""
    mlp = MLP()
    expected = gradients(mlp)
    mlp.recompute = True
    epsilon = mlp.act.epsilon
    epsilon.ds_id, whole = 0, epsilon.data.clone()
    mlp.act.register_forward_hook(lambda *_: setattr(epsilon, "data", torch.empty(0)))
    mlp.act.register_full_backward_pre_hook(lambda *_: setattr(epsilon, "data", whole))
    loss = mlp(x := inputs()).square().sum()
    assert epsilon.numel() == 0
    mlp.zero_grad()
    loss.backward()
    assert_same([x.grad, *(parameter.grad for parameter in mlp.parameters())], expected)


@pytest.mark.parametrize("changed", ["epsilon", "input"])
def test_what_was_changed_in_place_after_the_forward_pass_is_an_error(changed):
    mlp = MLP()
    mlp.recompute = True
    pre_activation = []
    mlp.up.register_forward_hook(lambda module, args, output: pre_activation.append(output))
    loss = mlp(inputs()).square().sum()
    with torch.no_grad():
        (mlp.act.epsilon if changed == "epsilon" else pre_activation[0]).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_an_error_within_leaves_no_hooks_behind():
    mlp = MLP()
    mlp.recompute = True
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        mlp(torch.ones(2, 7, requires_grad=True))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_without_gradients_it_does_nothing():
    mlp = MLP()
    expected = mlp(inputs()).detach()
    mlp.recompute = True
    with torch.no_grad(), recomputing():
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert torch.equal(mlp(inputs()), expected)


def test_under_torch_func():
    mlp = MLP()
    mlp.recompute = True
    found = torch.func.grad(lambda x: mlp(x).square().sum())(inputs().detach())
    torch.testing.assert_close(found, gradients(mlp)[0])


@both
def test_compiled_without_a_graph_break(gated):
    mlp = MLP(gated)
    expected = gradients(mlp)
    mlp.recompute = True
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(mlp, compiled), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
