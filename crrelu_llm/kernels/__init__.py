"""Computes CRReLU with the best backend for each call: `choice` selects it, `ops` has the torch operators."""

import torch
from torch import Tensor
from torch.nn import Parameter

from crrelu_llm.compat.torch import is_traceable_wrapper_subclass, is_transformed
from crrelu_llm.kernels import choice, formula, ops, reference
from crrelu_llm.kernels.choice import BACKENDS, set_backend

__all__ = ["BACKENDS", "crrelu", "crrelu_gated", "crrelu_packed", "set_backend"]

# Below this number of elements on a CPU, an operator's overhead dominates its cost in generation.
_FEW = 1 << 14


def crrelu(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Evaluates CRReLU, f, or with `affine` `gain·f(scale·(x + shift)) + offset`.

    Does not check its input; `crrelu_llm.activation.crrelu` does.

    Args:
        x: floating point, any shape and strides; with a per-channel ε, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: scale, shift, gain and offset, `(4, channels)`, which get no gradient. None: 1, 0, 1 and 0.

    Returns:
        Shape and dtype of `x`.
    """
    if _plain(x, epsilon):
        return formula.crrelu(x, epsilon, affine)
    if choice.forced() == "reference":
        return reference.crrelu(x, epsilon, affine)
    return ops.crrelu(x, epsilon, affine)


def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Evaluates CRReLU(gate)·up, the product of a gated MLP, in one pass, rounded once.

    Args:
        gate: floating point, any shape and strides; with a per-channel ε, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: scale, shift, gain and offset, `(4, channels)`, which get no gradient. None: 1, 0, 1 and 0.

    Returns:
        Shape and dtype of `gate`.
    """
    if _plain(gate, up, epsilon):
        return formula.crrelu_gated(gate, up, epsilon, affine)
    if choice.forced() == "reference":
        return reference.crrelu(gate, epsilon, affine) * up
    whole = _whole(gate, up)
    if whole is None:
        return ops.crrelu_gated(gate, up, epsilon, affine)
    return ops.crrelu_packed(whole, epsilon, affine)


def crrelu_packed(gate_up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Evaluates CRReLU(gate)·up for one tensor with both, as a fused gate-and-up projection returns it.

    Args:
        gate_up: floating point, `(..., 2·channels)`, the gate's channels first.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: scale, shift, gain and offset, `(4, channels)`, which get no gradient. None: 1, 0, 1 and 0.

    Returns:
        `(..., channels)`, dtype of `gate_up`.
    """
    if _plain(gate_up, epsilon):
        return formula.crrelu_packed(gate_up, epsilon, affine)
    if choice.forced() == "reference":
        gate, up = gate_up.chunk(2, dim=-1)
        return reference.crrelu(gate, epsilon, affine) * up
    return ops.crrelu_packed(gate_up, epsilon, affine)


def _whole(gate: Tensor, up: Tensor) -> Tensor | None:
    """The tensor of shape `(..., 2·channels)` that one `chunk` or `split` divided into `gate` and `up`; else None.

    Autograd would need an extra pass to concatenate the gradients of the halves. The gradient of the whole tensor
    replaces them only if both halves come from the same node of the graph, without hooks or retained gradients.
    """
    base, node = gate._base, gate.grad_fn
    if base is None or base is not up._base or node is None or node is not up.grad_fn:
        return None
    channels = gate.shape[-1] if gate.dim() > 0 else 0
    if node.next_functions[0][0] is not base.grad_fn or base.grad_fn is None or base.numel() != 2 * gate.numel():
        return None
    if any(half.retains_grad or half._backward_hooks for half in (gate, up)):
        return None
    halves = gate.storage_offset() == base.storage_offset() and up.storage_offset() == gate.storage_offset() + channels
    if not halves or not base.is_contiguous() or base.shape != (*gate.shape[:-1], 2 * channels):
        return None
    return base


def _plain(*tensors: Tensor) -> bool:
    """Whether to use the plain formula: while a compiler traces (plain operations fuse with their neighbours), under
    torch.func and in forward mode (the operators lack these derivatives), for wrapper tensors such as DTensor, and
    for a few elements without a gradient, where overhead dominates.
    """
    first = tensors[0]
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or any(type(tensor) not in (Tensor, Parameter) and _is_wrapper(tensor) for tensor in tensors)
        or (
            first.numel() < _FEW
            and first.device.type == "cpu"
            and not torch.is_grad_enabled()
            and choice.forced() is None
        )
    )


def _is_wrapper(tensor: Tensor) -> bool:
    return is_traceable_wrapper_subclass(tensor)
