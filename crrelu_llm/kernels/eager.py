"""CRReLU with torch's own operators, for every device and without a compiler. On a CPU it works in blocks that fit the
cache and reuses buffers, so that main memory is read and written once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from crrelu_llm.kernels.formula import SUPPORT

# Elements per block: the fastest of 2¹⁴ to 2¹⁷ on an AMD EPYC with 1 MiB of L2 cache per core.
_BLOCK = 1 << 17


def forward(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """CRReLU of `x`.

    Args:
        x: floating point, `(rows, columns)`, contiguous.
        epsilon: the dtype of the computation (float64 for a float64 `x`, else float32), `(1,)` or `(columns,)`.
        affine: scale, shift, gain and offset, `(4, 1)` if ε is `(1,)`, `(4, columns)` if ε is `(columns,)`, dtype of
            ε; None for 1, 0, 1 and 0.

    Returns:
        Shape and dtype of `x`.
    """
    y = torch.empty_like(x)
    for (x_part, y_part), (wide, t, b) in _blocks((x, y), epsilon, 3):
        y_part.copy_(_value(_inner(x_part, affine, wide), epsilon, affine, t, b))
    return y


def backward(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of ε.

    Args:
        grad: the gradient of the result; like `x`.
        x: as for `forward`; likewise `epsilon` and `affine`.

    Returns:
        Shape and dtype of `x`; shape and dtype of ε, summed in that dtype.
    """
    grad_x = torch.empty_like(x)
    total, steepness = _Total(epsilon, affine), _steepness(affine)
    for (g_part, x_part, out), (wide, t, b, slope, g) in _blocks((grad, x, grad_x), epsilon, 5):
        inner, wide_grad = _inner(x_part, affine, wide), _wide(g_part, g)
        _bump_and_slope(inner, epsilon, t, b, slope)
        if steepness is not None:
            slope.mul_(steepness)
        out.copy_(slope.mul_(wide_grad))
        total.add(b.mul_(wide_grad))
    return grad_x, total.value


def gated_forward(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """CRReLU(gate)·up, rounded once.

    Args:
        gate: floating point, `(rows, columns)`; rows need not be adjacent (one half of a packed tensor).
        up: like `gate`.
        epsilon: as for `forward`; likewise `affine`.

    Returns:
        Shape and dtype of `gate`, contiguous.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for (gate_part, up_part, y_part), (wide, t, b) in _blocks((gate, up, y), epsilon, 3):
        _value(_inner(gate_part, affine, wide), epsilon, affine, t, b)
        y_part.copy_(t.mul_(_wide(up_part, b)))
    return y


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, packed: bool, affine: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of gate, of up and of ε.

    Args:
        grad: the gradient of the result, `(rows, columns)`, contiguous.
        gate: as for `gated_forward`; likewise `up`.
        epsilon: as for `forward`.
        packed: return both gradients in one tensor `(rows, 2·columns)`, with None as the second result.
        affine: as for `forward`.

    Returns:
        Two tensors like `grad`, or one and None; shape and dtype of ε, summed in that dtype.
    """
    both = (
        torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device) if packed else None
    )
    grad_gate, grad_up = (torch.empty_like(grad), torch.empty_like(grad)) if both is None else both.chunk(2, dim=-1)
    total, steepness = _Total(epsilon, affine), _steepness(affine)
    tensors = (grad, gate, up, grad_gate, grad_up)
    for (g_part, gate_part, up_part, gate_out, up_out), buffers in _blocks(tensors, epsilon, 6):
        wide, t, b, slope, g, other = buffers
        inner, wide_grad, wide_up = _inner(gate_part, affine, wide), _wide(g_part, g), _wide(up_part, other)
        _bump_and_slope(inner, epsilon, t, b, slope)
        torch.clamp_min(inner, 0, out=t).addcmul_(b, epsilon)
        if affine is not None and steepness is not None:
            torch.addcmul(affine[3], t, affine[2], out=t)
            slope.mul_(steepness)
        up_out.copy_(t.mul_(wide_grad))
        torch.mul(wide_grad, wide_up, out=t)
        gate_out.copy_(slope.mul_(t))
        total.add(b.mul_(t))
    return (grad_gate, grad_up, total.value) if both is None else (both, None, total.value)


class _Total:
    """The gradient of ε, summed block by block in a fixed order."""

    def __init__(self, epsilon: Tensor, affine: Tensor | None) -> None:
        self._sum, self._affine = torch.zeros_like(epsilon), affine
        self._per_channel = epsilon.numel() > 1

    def add(self, product: Tensor) -> None:
        self._sum.add_(product.sum(0) if self._per_channel else product.sum())

    @property
    def value(self) -> Tensor:
        return self._sum if self._affine is None else self._sum * self._affine[2]


def _blocks(
    tensors: tuple[Tensor, ...], epsilon: Tensor, buffers: int
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yields the same rows of every tensor, one block at a time, with buffers of their shape in the dtype of ε."""
    first = tensors[0]
    if first.numel() <= _BLOCK or first.device.type != "cpu":
        yield tensors, [torch.empty(first.shape, dtype=epsilon.dtype, device=first.device) for _ in range(buffers)]
        return
    if epsilon.numel() == 1 and all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)  # so that blocks are full for any shape
    first = tensors[0]
    length = first.shape[0]
    step = max(1, _BLOCK * length // first.numel())
    memory = [first.new_empty((min(step, length), *first.shape[1:]), dtype=epsilon.dtype) for _ in range(buffers)]
    for start in range(0, length, step):
        parts = [tensor[start : start + step] for tensor in tensors]
        yield parts, [buffer[: parts[0].shape[0]] for buffer in memory]


def _wide(x: Tensor, buffer: Tensor) -> Tensor:
    """`x` in the dtype of the buffer, copied into the buffer only if a conversion is needed."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def _inner(x: Tensor, affine: Tensor | None, buffer: Tensor) -> Tensor:
    """The input of f, in the dtype of the buffer: x, or scale·(x + shift)."""
    x = _wide(x, buffer)
    return x if affine is None else torch.add(x, affine[1], out=buffer).mul_(affine[0])


def _steepness(affine: Tensor | None) -> Tensor | None:
    """The factor of the derivative of f: gain·scale."""
    return None if affine is None else affine[0] * affine[2]


def _value(x: Tensor, epsilon: Tensor, affine: Tensor | None, t: Tensor, b: Tensor) -> Tensor:
    """Sets t = gain·f(x) + offset and returns it; b is overwritten."""
    torch.clamp(x, -SUPPORT, SUPPORT, out=t)  # exp(−t²/2) is 0 outside, and NaN stays NaN
    torch.mul(t, t, out=b).mul_(-0.5).exp_().mul_(t)
    torch.clamp_min(x, 0, out=t).addcmul_(b, epsilon)
    return t if affine is None else torch.addcmul(affine[3], t, affine[2], out=t)


def _bump_and_slope(x: Tensor, epsilon: Tensor, t: Tensor, b: Tensor, slope: Tensor) -> None:
    """Sets b = x·exp(−x²/2), slope = 1[x > 0] + ε·(1 − x²)·exp(−x²/2); t is overwritten."""
    torch.clamp(x, -SUPPORT, SUPPORT, out=t)
    torch.mul(t, t, out=slope)
    torch.mul(slope, -0.5, out=b).exp_()
    slope.neg_().add_(1).mul_(b).mul_(epsilon)
    b.mul_(t)
    slope.add_(torch.gt(x, 0, out=t))
