"""CRReLU as torch operators: `torch.ops.crrelu_llm.{crrelu, crrelu_gated, crrelu_packed}` and their backward passes,
with fake kernels and with first and second gradients. torch.func cannot differentiate such operators, so `kernels`
uses the plain formula there."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.kernels import formula
from crrelu_llm.kernels.choice import run


def _rows(x: Tensor) -> Tensor:
    """`x` as `(rows, columns)`, with contiguous columns, copied only if necessary."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() > 0 else x.reshape(1, 1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _shaped(result: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A result in the shape of the input; not a view, because a custom operator's view cannot be changed in place."""
    return torch.ops.aten._unsafe_view(result, shape)


def _wide(epsilon: Tensor, affine: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """ε and the four in the dtype of the computation. With the four, ε is expanded to one value per channel."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    epsilon = epsilon.detach().to(wide)
    if affine is None:
        return epsilon.contiguous(), None
    return epsilon.expand(affine.shape[1]).contiguous(), affine.detach().to(wide).contiguous()


def _total(total: Tensor, epsilon: Tensor) -> Tensor:
    """The gradient of ε in the shape of ε: for a single ε, the sum over the channels."""
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
    """The gradients of `x` and ε from the gradient of the result, which has the shape and dtype of `x`."""
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
    """The gradients of gate, up and ε from the gradient of the result."""
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
    """The gradients of gate_up and ε from the gradient of the result."""
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
    """Registers the gradient of an operator, and the second gradient, which is the plain formula's (not for training).

    The four, always the last input, get no gradient: where they are learned, `activation` composes them around f.
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
