"""CRReLU by the best backend for each call: see `choice` for how it is chosen, `ops` for the torch operators."""

import torch
from torch import Tensor

from crrelu_llm.kernels import choice, formula, ops, reference
from crrelu_llm.kernels.choice import BACKENDS, set_backend

__all__ = ["BACKENDS", "crrelu", "crrelu_gated", "crrelu_packed", "set_backend"]


def crrelu(x: Tensor, epsilon: Tensor) -> Tensor:
    """Evaluates CRReLU. Checks nothing: see `crrelu_llm.activation.crrelu`.

    Args:
        x: floating point, any shape and strides; with a per-channel ε, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `x`.
    """
    if _transformed():
        return formula.crrelu(x, epsilon)
    if choice.forced() == "reference":
        return reference.crrelu(x, epsilon)
    return ops.crrelu(x, epsilon)


def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor) -> Tensor:
    """Evaluates CRReLU(gate)·up, the product of a gated MLP, in one pass, rounded once.

    Args:
        gate: floating point, any shape and strides; with a per-channel ε, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `gate`.
    """
    if _transformed():
        return formula.crrelu_gated(gate, up, epsilon)
    if choice.forced() == "reference":
        return reference.crrelu(gate, epsilon) * up
    whole = _whole(gate, up)
    return ops.crrelu_gated(gate, up, epsilon) if whole is None else ops.crrelu_packed(whole, epsilon)


def crrelu_packed(gate_up: Tensor, epsilon: Tensor) -> Tensor:
    """Evaluates CRReLU(gate)·up of a tensor that holds both, as a fused gate and up-projection gives it.

    Args:
        gate_up: floating point, `(..., 2·channels)`, the gate's channels first.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        `(..., channels)`, dtype of `gate_up`.
    """
    if _transformed():
        return formula.crrelu_packed(gate_up, epsilon)
    if choice.forced() == "reference":
        gate, up = gate_up.chunk(2, dim=-1)
        return reference.crrelu(gate, epsilon) * up
    return ops.crrelu_packed(gate_up, epsilon)


def _whole(gate: Tensor, up: Tensor) -> Tensor | None:
    """The tensor of shape `(..., 2·channels)` that `chunk` has cut into two halves, where autograd would have to put
    their gradients together again; else None."""
    base, channels = gate._base, gate.shape[-1] if gate.dim() > 0 else 0
    if base is None or base is not up._base or not gate.requires_grad or base.numel() != 2 * gate.numel():
        return None
    halves = gate.storage_offset() == base.storage_offset() and up.storage_offset() == gate.storage_offset() + channels
    shape = (*gate.shape[:-1], 2 * channels)
    if not halves or not base.is_contiguous() or gate.stride() != up.stride():
        return None
    whole = base.view(shape)
    return whole if whole.stride() == gate.stride() else None


def _transformed() -> bool:
    """Whether a compiler traces, which fuses plain operations with their neighbours, or torch.func transforms."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
