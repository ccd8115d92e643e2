"""CRReLU with a centre and a width: the closed form, exact far away, calibrated, recomputed and cast."""

import contextlib

import pytest
import torch

from crrelu_llm.activation import AFFINE
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.kernels.recompute import recomputing


def _module(size=None, calibrated=None, center=-0.5, width=0.75):
    module = FittedCRReLU(size, 0.3, calibrated=calibrated)
    module.center.fill_(center)
    module.width.fill_(width)
    return module


def _definition(x, epsilon, center, width):
    z = x - center
    return torch.relu(x) + epsilon * z * torch.exp(-0.5 * (z / width) ** 2)


@pytest.mark.parametrize(("center", "width"), [(0.0, 1.0), (-0.75, 0.5), (1.25, 2.5), (0.0, 2**-10), (3.0, 2**-6)])
def test_values_and_derivatives_are_those_of_the_closed_form(center, width):
    module = _module(center=center, width=width).double()
    near = torch.linspace(-4, 4, 41, dtype=torch.float64)
    x = torch.cat([near + 0.01, center + width * near]).requires_grad_()
    epsilon = module.epsilon.detach().clone().requires_grad_()
    expected = _definition(x, epsilon, center, width)
    y = module(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-15)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, module.epsilon)),
        torch.autograd.grad(expected.sum(), (x, epsilon)),
        strict=True,
    ):
        # At the centre itself the bump is x times epsilon: one side of the fold must have the slope.
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    single = _module(center=center, width=width)(x.detach().float())
    exact = _definition(x.detach().float().double(), 0.3, center, width)
    assert ((single.double() - exact).abs() <= 1e-6 * (exact.abs() + width)).all()


def test_first_and_second_gradients_also_calibrated_and_gated():
    x, up = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for module in (_module(4), _module(calibrated=4)):
        module.double()
        if module.is_calibrated:
            module.scale.fill_(-1.5)
            module.train_affine()
        inputs = (x.clone().requires_grad_(), up.clone().requires_grad_(), *module.parameters())
        assert torch.autograd.gradcheck(lambda gate, up, *_, module=module: module(gate, up), inputs)
        assert torch.autograd.gradgradcheck(lambda gate, up, *_, module=module: module(gate, up), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_and_nan(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 60000.0, -60000.0], dtype=dtype).requires_grad_()
    y = _module()(x)
    y.sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.relu(x), equal_nan=True)
    torch.testing.assert_close(x.grad[[0, 1, 3, 4]], torch.tensor([1, 0, 1, 0], dtype=dtype))


def test_it_is_saved_reset_cast_and_calibrated():
    module = _module(calibrated=3)
    assert set(module.state_dict()) == {"epsilon", "center", "width", *AFFINE}
    assert set(FittedCRReLU().state_dict()) == {"epsilon", "center", "width"}
    assert module.start_values.keys() == module.state_dict().keys()
    module.gain.fill_(2.0)
    module.offset.fill_(0.5)
    x = torch.linspace(-2, 2, 9).reshape(3, 3)
    torch.testing.assert_close(module(x), 2 * _module()(x) + 0.5)
    module.bfloat16()
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32} and module.center.item() == -0.5
    module.reset_parameters()
    assert (module.center.item(), module.width.item(), module.gain.tolist()) == (0.0, 1.0, [1.0] * 3)


def test_compiled_without_a_graph_break():
    module, x = _module(), torch.linspace(-2, 2, 9)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@pytest.mark.parametrize("gated", [False, True])
def test_moments_may_move_between_the_passes_and_recomputing_gives_the_same_gradients(gated):
    def gradients(within):
        module = _module()
        x = torch.linspace(-2, 2, 45).reshape(9, 5).requires_grad_()
        weight = torch.linspace(-1, 1, 15).reshape(5, 3).requires_grad_()
        with within():
            hidden = module(x * 1.0, x * 2.0) if gated else module(x * 1.0)
            y = hidden @ weight
        module.center.fill_(5.0)
        module.width.fill_(5.0)
        y.square().sum().backward()
        return x.grad, weight.grad, module.epsilon.grad

    for plain, recomputed in zip(gradients(contextlib.nullcontext), gradients(recomputing), strict=True):
        assert torch.equal(plain, recomputed)
