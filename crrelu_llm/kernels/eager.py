"""CRReLU as an eager autograd function: keeps only x and ε for the backward pass, and is right at 0, ±inf and NaN."""

from typing import Any

import torch

# exp(−t²/2) is exactly 0 at |t| = 40, even in float64 (its last subnormal is at 38.6). Clamping to it changes no
# value of the bump or of its derivatives, and turns the inf·0 = NaN of an infinite x into 0. NaN passes through.
_BUMP_SUPPORT = 40.0


def _widen(x: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts both to the dtype of the computation: float64 for a float64 `x`, float32 for every other."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # A single ε becomes 0-dimensional, so that it never adds a dimension to a 0-dimensional x (as under vmap).
    return x.to(compute_dtype), epsilon.to(compute_dtype).squeeze()


class _CRReLUFunction(torch.autograd.Function):
    """Forward and backward written out; the backward consists of differentiable operations (double backward)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        wide_x, wide_epsilon = _widen(x, epsilon)
        t = wide_x.clamp(-_BUMP_SUPPORT, _BUMP_SUPPORT)
        bump = t * torch.exp(t.square() * -0.5)
        return (torch.relu(wide_x) + wide_epsilon * bump).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, epsilon = ctx.saved_tensors
        wide_x, wide_epsilon = _widen(x, epsilon)
        wide_grad = grad_output.to(wide_x.dtype)
        t = wide_x.clamp(-_BUMP_SUPPORT, _BUMP_SUPPORT)
        bell = torch.exp(t.square() * -0.5)
        grad_x = grad_epsilon = None
        if ctx.needs_input_grad[0]:
            slope = (wide_x > 0) + wide_epsilon * ((1 - t.square()) * bell)
            grad_x = (wide_grad * slope).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = wide_grad * (t * bell)
            total = product.sum().reshape(1) if epsilon.numel() == 1 else product.sum_to_size(epsilon.shape)
            grad_epsilon = total.to(epsilon.dtype)
        return grad_x, grad_epsilon


def crrelu(x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Evaluates CRReLU in float32 (float64 for a float64 `x`) whatever the storage dtype.

    At x = 0 the derivative is ε (relu'(0) = 0); at ±inf the value is relu(x) and the derivative 1 or 0; NaN in
    gives NaN out, in the value and in the gradients. The gradient of ε is summed in the dtype of the computation
    and comes back in the dtype and shape of ε.

    Args:
        x: floating point, any shape and strides; with a per-channel ε, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `x`.
    """
    return _CRReLUFunction.apply(x, epsilon)
