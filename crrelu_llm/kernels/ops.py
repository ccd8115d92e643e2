"""CRReLU as torch operators: `torch.ops.crrelu_llm.{crrelu, crrelu_gated, crrelu_packed}` and the backward pass of
each, with fake kernels and gradients, also second ones. Under torch.func, which no such operator can be differentiated
in, `kernels` takes the plain formula."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.kernels import formula
from crrelu_llm.kernels.choice import run


def _rows(x: Tensor) -> Tensor:
    """`x` as `(rows, columns)`, the columns side by side in memory, copied only where it must be."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() > 0 else x.reshape(1, 1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _shaped(result: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A result in the shape of the input; no view, which could not be changed in place behind a custom operator."""
    return torch.ops.aten._unsafe_view(result, shape)


def _wide(epsilon: Tensor, affine: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """ε and the four in the dtype of the computation. With the four ε is one a channel, as they are."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    epsilon = epsilon.detach().to(wide)
    if affine is None:
        return epsilon.contiguous(), None
    return epsilon.expand(affine.shape[1]).contiguous(), affine.detach().to(wide).contiguous()


def _total(total: Tensor, epsilon: Tensor) -> Tensor:
    """The gradient of ε as ε is: one for all channels is their sum."""
    if total.numel() != epsilon.numel():
        total = total.sum(0, keepdim=True)
    return total.to(epsilon.dtype)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("crrelu_llm::crrelu", mutates_args=())
def crrelu(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `kernels.crrelu`."""
    if x.numel() == 0:
        return _like(x)
    return _shaped(run("forward", _rows(x).contiguous(), *_wide(epsilon, affine, x)), x.shape)


@torch.library.custom_op("crrelu_llm::crrelu_backward", mutates_args=())
def crrelu_backward(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and ε, given that of the result, of the shape and dtype of `x`."""
    if x.numel() == 0:
        return _like(x), torch.zeros_like(epsilon)
    tensors = (_rows(grad).contiguous(), _rows(x).contiguous())
    grad_x, total = run("backward", *tensors, *_wide(epsilon, affine, x))
    return _shaped(grad_x, x.shape), _total(total, epsilon)


@torch.library.custom_op("crrelu_llm::crrelu_gated", mutates_args=())
def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `kernels.crrelu_gated`."""
    if gate.numel() == 0:
        return _like(gate)
    return _shaped(run("gated_forward", _rows(gate), _rows(up), *_wide(epsilon, affine, gate)), gate.shape)


@torch.library.custom_op("crrelu_llm::crrelu_gated_backward", mutates_args=())
def crrelu_gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and ε, given that of the result."""
    if gate.numel() == 0:
        return _like(gate), _like(gate), torch.zeros_like(epsilon)
    wide, four = _wide(epsilon, affine, gate)
    tensors = (_rows(grad).contiguous(), _rows(gate), _rows(up), wide)
    grad_gate, grad_up, total = run("gated_backward", *tensors, False, four)
    return _shaped(grad_gate, gate.shape), _shaped(grad_up, gate.shape), _total(total, epsilon)


@torch.library.custom_op("crrelu_llm::crrelu_packed", mutates_args=())
def crrelu_packed(gate_up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `kernels.crrelu_packed`."""
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if gate_up.numel() == 0:
        return gate_up.new_empty(shape)
    gate, up = _rows(gate_up).chunk(2, dim=-1)
    return _shaped(run("gated_forward", gate, up, *_wide(epsilon, affine, gate_up)), shape)


@torch.library.custom_op("crrelu_llm::crrelu_packed_backward", mutates_args=())
def crrelu_packed_backward(
    grad: Tensor, gate_up: Tensor, epsilon: Tensor, affine: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and ε, given that of the result."""
    if gate_up.numel() == 0:
        return _like(gate_up), torch.zeros_like(epsilon)
    gate, up = _rows(gate_up).chunk(2, dim=-1)
    wide, four = _wide(epsilon, affine, gate_up)
    both, _, total = run("gated_backward", _rows(grad).contiguous(), gate, up, wide, True, four)
    return _shaped(both, gate_up.shape), _total(total, epsilon)


@crrelu.register_fake
def _(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    return _like(x)


@crrelu_gated.register_fake
def _(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    return _like(gate)


@crrelu_packed.register_fake
def _(gate_up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@crrelu_backward.register_fake
@crrelu_packed_backward.register_fake
def _(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, ...]:
    return _like(x), _like(epsilon)


@crrelu_gated_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, ...]:
    return _like(gate), _like(up), _like(epsilon)


def _differentiable(op: Any, backward_op: Any, plain: Callable[..., Tensor]) -> None:
    """Gives an operator its gradient, and that gradient its own, the plain formula's: training never asks for it.

    The four, always the last input, get none: where they are learned, `activation` composes what surrounds f.
    """

    def save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_op(grad, *ctx.saved_tensors), None

    def double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, affine = ctx.saved_tensors

        def plain_backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(functools.partial(plain, affine=affine), *inputs)[1](grad)

        return *torch.func.vjp(plain_backward, *inputs)[1](grads), None

    op.register_autograd(backward, setup_context=save)
    backward_op.register_autograd(double_backward, setup_context=save)


_differentiable(crrelu, crrelu_backward, formula.crrelu)
_differentiable(crrelu_gated, crrelu_gated_backward, formula.crrelu_gated)
_differentiable(crrelu_packed, crrelu_packed_backward, formula.crrelu_packed)
