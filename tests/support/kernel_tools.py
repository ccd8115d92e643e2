"""What the tests of the kernels share: the backends by name, inputs, and value and gradients of a function."""

import importlib.util

import pytest
import torch

from crrelu_llm.kernels import BACKENDS, eager

every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# The reference is the bare formula: what goes beyond it is promised by the others only.
robust_backend = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Several blocks and tiles of 64 elements, in both directions; rows that no block, tile or group of four divides.
BLOCK_SHAPES = [(70, 5), (13, 33), (1, 150), (150, 1), (67, 17)]


def normal(shape, dtype=torch.float64, scale=1.5, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def epsilon_of(size, dtype=torch.float64):
    # Multiples of 1/16 are exact in every dtype, so that all of them see the same ε.
    return ((torch.arange(size) % 16 - 5) / 16).to(dtype)


def bump(x):
    """∂f/∂ε, in float64."""
    return x.double() * torch.exp(-x.double().square() / 2)


def evaluate(function, *inputs, grad):
    """Value and the gradient of each input, detached."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def shrink_blocks(monkeypatch):
    """Blocks and tiles of 64 elements, so that small tensors need several."""
    monkeypatch.setattr(eager, "_BLOCK", 64)
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("crrelu_llm.kernels.triton._TILE", 64)


def assert_epsilon_close(backend, dtype, ours, exact, summands):
    """Float32 rounding; for bfloat16 input, the compiled loops' short series of exp (8e-5 of each summand) as well."""
    if backend == "inductor" and dtype == torch.bfloat16:
        assert ((ours.double() - exact).abs() <= 1e-4 * summands).all()
    else:
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def assert_error_is_below_twice(result, plain, truth, summands):
    """Liger-Kernel's criterion, for the value and each gradient: 2 × the plain formula's error in the same dtype.

    And an ulp: of the exact result, or for the gradient of ε of the sum of its absolute summands.
    """
    for ours, theirs, exact, size in zip(result, plain, truth, (*truth[:-1], summands), strict=True):
        one_ulp = torch.finfo(ours.dtype).eps * size.abs().max()
        error, plain_error = (ours - exact).abs(), (theirs - exact).abs()
        assert error.max() <= 2 * plain_error.max() + one_ulp
        assert error.mean() <= 2 * plain_error.mean() + one_ulp


def assert_gradients(backend, function, inputs):
    """First and second derivatives against differences; in Triton's interpreter, 20 times slower, along random
    directions."""
    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)
