"""CRReLU through torch.compile of the operator alone: one forward loop, and one backward loop with the gradient of ε.
For CPUs with a C++ compiler; the loops are compiled once for all sizes, and torch caches them on disk."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.compat.torch import compiled_apart, cpp_compiler, is_compiler_disabled, tree_map_only
from crrelu_llm.kernels import eager
from crrelu_llm.kernels.formula import SUPPORT

# Rows whose ε gradients are summed in registers, per channel, before they are stored.
_ROWS = 4
_OPTIONS: dict[str, Any] = {
    "dynamic": True,
    "options": {"cpp.enable_floating_point_contract_flag": "fast", "cpp.dynamic_threads": True},
}
# Numbers in the loops are literals: torch turns each named number into an argument, a separate tensor that each call
# must build and the loop must keep in a register; a bfloat16 product took up to three times as long.
assert SUPPORT == 40.0


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if device.type != "cpu":
        return "it compiles loops for CPUs only"
    if is_compiler_disabled():
        return "torch.compile is disabled (TORCHDYNAMO_DISABLE)"
    try:
        found = shutil.which(cpp_compiler())
    except Exception as error:
        return f"no C++ compiler ({' '.join(str(error).split())})"
    return None if found else "no C++ compiler"


def forward(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `eager.forward`."""
    if epsilon.numel() == 1:
        return _compiled(_forward, x.dtype, 1, affine is None)(x.view(-1), epsilon, affine).view(x.shape)
    return _compiled(_forward, x.dtype, 2, affine is None)(x, epsilon, affine)


def backward(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `eager.backward`."""
    if epsilon.numel() == 1:
        loop = _compiled(_backward, x.dtype, 1, affine is None)
        grad_x, total = loop(grad.view(-1), x.view(-1), epsilon, affine)
        return grad_x.view(x.shape), _gained(total.view(1), affine)
    whole = _whole(x)
    if whole == 0:
        return eager.backward(grad, x, epsilon, affine)
    grad_x = torch.empty_like(x)
    total = _by_rows(_backward_rows, (grad[:whole], x[:whole]), (grad_x[:whole],), epsilon, affine)
    if whole < x.shape[0]:
        grad_x[whole:], rest = eager.backward(grad[whole:], x[whole:], epsilon, affine)
        total += rest
    return grad_x, total


def gated_forward(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `eager.gated_forward`."""
    if epsilon.numel() == 1 and gate.is_contiguous() and up.is_contiguous():
        loop = _compiled(_gated_forward, gate.dtype, 1, affine is None)
        return loop(gate.view(-1), up.view(-1), epsilon, affine).view(gate.shape)
    variant = (2, epsilon.numel() > 1, gate.is_contiguous(), affine is None)
    return _compiled(_gated_forward, gate.dtype, *variant)(gate, up, epsilon, affine)


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, packed: bool, affine: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.gated_backward`."""
    if epsilon.numel() > 1:
        whole = _whole(gate)
        if whole == 0:
            return eager.gated_backward(grad, gate, up, epsilon, packed, affine)
        both = grad.new_empty((grad.shape[0], 2 * grad.shape[1])) if packed else None
        first, second = (torch.empty_like(grad), torch.empty_like(grad)) if both is None else both.chunk(2, dim=-1)
        inputs = (grad[:whole], gate[:whole], up[:whole])
        total = _by_rows(_gated_backward_rows, inputs, (first[:whole], second[:whole]), epsilon, affine)
        if whole < gate.shape[0]:
            left = (grad[whole:], gate[whole:], up[whole:])
            rest, _, rest_total = eager.gated_backward(*left, epsilon, True, affine)
            first[whole:], second[whole:] = rest.chunk(2, dim=-1)
            total += rest_total
        return (first, second, total) if both is None else (both, None, total)
    if packed:
        both, total = _compiled(_packed_backward, gate.dtype, 2, affine is None)(grad, gate, up, epsilon, affine)
        return both, None, _gained(total.view(1), affine)
    flat = gate.is_contiguous() and up.is_contiguous()
    tensors = [tensor.view(-1) for tensor in (grad, gate, up)] if flat else [grad, gate, up]
    loop = _compiled(_gated_backward, gate.dtype, tensors[0].dim(), affine is None)
    grad_gate, grad_up, total = loop(*tensors, epsilon, affine)
    return grad_gate.view(gate.shape), grad_up.view(gate.shape), _gained(total.view(1), affine)


@functools.cache
def _compiled(function: Any, *variant: object) -> Callable[..., Any]:
    """`function` compiled for one dtype, number of dimensions, …: each variant has its own cache in torch, so that no
    variant is evicted or checked against the guards of the others."""
    compiled = compiled_apart(function, **_OPTIONS)

    def call(*args: Any) -> Any:
        # The same graph in training and inference: the operators have their own gradients.
        with torch.no_grad():
            return compiled(*tree_map_only(Tensor, Tensor.detach, args))

    return call


def _by_rows(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    outputs: Any,
    epsilon: Tensor,
    affine: Tensor | None,
) -> Tensor:
    """Runs a loop over _ROWS rows at once, which writes `outputs`; returns the gradient of ε per channel.

    The reduction over rows that torch.compile generates would read memory column by column.
    """
    parts = [tensor.unflatten(0, (-1, _ROWS)).unbind(1) for tensor in (*inputs, *outputs)]
    contiguous = all(tensor.is_contiguous() for tensor in (*inputs, *outputs))
    loop = _compiled(function, inputs[0].dtype, contiguous, affine is None)
    return _gained(loop(parts[: len(inputs)], parts[len(inputs) :], epsilon, affine).sum(0), affine)


def _whole(x: Tensor) -> int:
    """How many rows the loops over several rows process; the eager backend processes the few others."""
    return x.shape[0] - x.shape[0] % _ROWS


def _bell(square: Tensor, low_precision: bool) -> Tensor:
    """exp(−square/2). In low precision by a short series, in a third of the time: its relative error is below 8e-5,
    that of bfloat16 is 2e-3. exp(r) ≈ 1 + r + r²/2 + Σ cₖ·rᵏ for −1.33 ≤ r ≤ 0, minimax in the relative error
    (7.2e-7)."""
    if not low_precision:
        return torch.exp(square * -0.5)
    r = square * (-0.5 / 64)
    cubic = ((r * 0.0008013846453000735 + 0.0075666351521354374) * r + 0.041212497349890014) * r + 0.16656760612621638
    bell = ((cubic * r + 0.5) * r + 1.0) * r + 1.0
    return bell.pow(8).pow(8)


def _parts(x: Tensor, epsilon: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the wide dtype: the input of f, t = x or scale·(x + shift); the bump t·exp(−t²/2), its slope, and ε."""
    low_precision = x.dtype == torch.bfloat16
    t = x.to(epsilon.dtype)
    if affine is not None:
        t = (t + _one(affine[1])) * _one(affine[0])
    # Beyond the support, a point where bump and slope are both exactly 0; at 0 the slope would be 1. The support of
    # the series ends where exp(−13²/2) = 2e-37 is just above the smallest normal float32; at 16 it gives exactly 0.
    within = torch.where(t.abs() > 13.0, 16.0, t) if low_precision else torch.where(t.abs() > 40.0, 40.0, t)
    square = within * within
    bell = _bell(square, low_precision)
    return t, within * bell, bell - square * bell, _one(epsilon)


def _value(t: Tensor, bump: Tensor, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    value = torch.relu(t) + epsilon * bump
    return value if affine is None else value * _one(affine[2]) + _one(affine[3])


def _slope(t: Tensor, bump_slope: Tensor, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    slope = torch.where(t > 0, 1.0, 0.0) + epsilon * bump_slope
    return slope if affine is None else slope * (_one(affine[0]) * _one(affine[2]))


def _gained(total: Tensor, affine: Tensor | None) -> Tensor:
    """The gradient of ε from the gradient inside f: the gain is constant per channel, so the loop can omit it."""
    return total if affine is None else total * affine[2]


def _one(value: Tensor) -> Tensor:
    return value if value.numel() > 1 else value.squeeze()


def _forward(x: Tensor, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    t, bump, _, epsilon = _parts(x, epsilon, affine)
    return _value(t, bump, epsilon, affine).to(x.dtype)


def _gradients(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    t, bump, bump_slope, epsilon = _parts(x, epsilon, affine)
    grad = grad.to(t.dtype)
    return (grad * _slope(t, bump_slope, epsilon, affine)).to(x.dtype), grad * bump


def _gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    t, bump, bump_slope, epsilon = _parts(gate, epsilon, affine)
    grad = grad.to(t.dtype)
    slope, value = _slope(t, bump_slope, epsilon, affine), _value(t, bump, epsilon, affine)
    grad_value = grad * up.to(t.dtype)
    return (grad_value * slope).to(gate.dtype), (grad * value).to(gate.dtype), grad_value * bump


def _backward(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_x, product = _gradients(grad, x, epsilon, affine)
    return grad_x, product.sum()


def _backward_rows(inputs: Any, outputs: Any, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    total = None
    for grad, x, out in zip(*inputs, *outputs, strict=True):
        grad_x, product = _gradients(grad, x, epsilon, affine)
        out.copy_(grad_x)
        total = product if total is None else total + product
    assert total is not None
    return total


def _gated_forward(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    t, bump, _, epsilon = _parts(gate, epsilon, affine)
    return (_value(t, bump, epsilon, affine) * up.to(t.dtype)).to(gate.dtype)


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_up, product = _gated_gradients(grad, gate, up, epsilon, affine)
    return grad_gate, grad_up, product.sum()


def _packed_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up, product = _gated_gradients(grad, gate, up, epsilon, affine)
    return torch.cat((grad_gate, grad_up), dim=1), product.sum()


def _gated_backward_rows(inputs: Any, outputs: Any, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    total = None
    for grad, gate, up, gate_out, up_out in zip(*inputs, *outputs, strict=True):
        grad_gate, grad_up, product = _gated_gradients(grad, gate, up, epsilon, affine)
        gate_out.copy_(grad_gate)
        up_out.copy_(grad_up)
        total = product if total is None else total + product
    assert total is not None
    return total
