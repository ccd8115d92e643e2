"""CRReLU by torch's own operators, for every device and without a compiler: on a CPU in blocks that stay in the cache,
with buffers that are used again, so that main memory is read and written once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from crrelu_llm.kernels.formula import SUPPORT

# Elements a block: the fastest of 2¹⁴ to 2¹⁷ on an AMD EPYC with 1 MiB of second-level cache a core.
_BLOCK = 1 << 17


def forward(x: Tensor, epsilon: Tensor, moments: Tensor | None = None) -> Tensor:
    """CRReLU of `x`.

    Args:
        x: floating point, `(rows, columns)`, contiguous.
        epsilon: the dtype of the computation (float64 for a float64 `x`, else float32), `(1,)` or `(columns,)`.
        moments: μ and σ of the bump, `(2, 1)` or `(2, columns)` as ε is `(1,)` or `(columns,)`, dtype of ε; None for
            0 and 1.

    Returns:
        Shape and dtype of `x`.
    """
    y = torch.empty_like(x)
    for (x_part, y_part), (wide, t, b) in _blocks((x, y), epsilon, 3):
        wide_x = _wide(x_part, wide)
        _bump(wide_x, moments, t, b)
        torch.clamp_min(wide_x, 0, out=t)
        y_part.copy_(t.addcmul_(b, epsilon))
    return y


def backward(grad: Tensor, x: Tensor, epsilon: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of ε.

    Args:
        grad: the gradient of the result; like `x`.
        x: as for `forward`, and so are `epsilon` and `moments`.

    Returns:
        Shape and dtype of `x`; shape and dtype of ε, summed in that dtype.
    """
    grad_x = torch.empty_like(x)
    total = _Total(epsilon)
    for (g_part, x_part, out), (wide, t, b, slope, g) in _blocks((grad, x, grad_x), epsilon, 5):
        wide_x, wide_grad = _wide(x_part, wide), _wide(g_part, g)
        _bump_and_slope(wide_x, epsilon, moments, t, b, slope)
        out.copy_(slope.mul_(wide_grad))
        total.add(b.mul_(wide_grad))
    return grad_x, total.value


def gated_forward(gate: Tensor, up: Tensor, epsilon: Tensor, moments: Tensor | None = None) -> Tensor:
    """CRReLU(gate)·up, rounded once.

    Args:
        gate: floating point, `(rows, columns)`; rows may be apart (one half of a packed tensor).
        up: like `gate`.
        epsilon: as for `forward`, and so are the moments.

    Returns:
        Shape and dtype of `gate`, contiguous.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for (gate_part, up_part, y_part), (wide, t, b) in _blocks((gate, up, y), epsilon, 3):
        wide_gate = _wide(gate_part, wide)
        _bump(wide_gate, moments, t, b)
        torch.clamp_min(wide_gate, 0, out=t)
        t.addcmul_(b, epsilon)
        y_part.copy_(t.mul_(_wide(up_part, b)))
    return y


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, packed: bool, moments: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of gate, of up and of ε.

    Args:
        grad: the gradient of the result, `(rows, columns)`, contiguous.
        gate: as for `gated_forward`, and so is `up`.
        epsilon: as for `forward`.
        packed: Both gradients in one tensor `(rows, 2·columns)`, the first of the result; the second is None.
        moments: as for `forward`.

    Returns:
        Two tensors like `grad`, or one and None; shape and dtype of ε, summed in that dtype.
    """
    both = (
        torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device) if packed else None
    )
    grad_gate, grad_up = (torch.empty_like(grad), torch.empty_like(grad)) if both is None else both.chunk(2, dim=-1)
    total = _Total(epsilon)
    tensors = (grad, gate, up, grad_gate, grad_up)
    for (g_part, gate_part, up_part, gate_out, up_out), buffers in _blocks(tensors, epsilon, 6):
        wide, t, b, slope, g, other = buffers
        wide_gate, wide_grad, wide_up = _wide(gate_part, wide), _wide(g_part, g), _wide(up_part, other)
        _bump_and_slope(wide_gate, epsilon, moments, t, b, slope)
        torch.clamp_min(wide_gate, 0, out=t)
        up_out.copy_(t.addcmul_(b, epsilon).mul_(wide_grad))
        torch.mul(wide_grad, wide_up, out=t)
        gate_out.copy_(slope.mul_(t))
        total.add(b.mul_(t))
    return (grad_gate, grad_up, total.value) if both is None else (both, None, total.value)


class _Total:
    """The gradient of ε, summed block by block: always in the same order."""

    def __init__(self, epsilon: Tensor) -> None:
        self.value = torch.zeros_like(epsilon)
        self.per_channel = epsilon.numel() > 1

    def add(self, product: Tensor) -> None:
        self.value.add_(product.sum(0) if self.per_channel else product.sum())


def _blocks(
    tensors: tuple[Tensor, ...], epsilon: Tensor, buffers: int
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """The same rows of every tensor, as many as a block holds, with as many buffers of their shape, dtype of ε."""
    first = tensors[0]
    if first.numel() <= _BLOCK or first.device.type != "cpu":
        yield tensors, [torch.empty(first.shape, dtype=epsilon.dtype, device=first.device) for _ in range(buffers)]
        return
    if epsilon.numel() == 1 and all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)  # so that a block is full whatever the shape is
    first = tensors[0]
    length = first.shape[0]
    step = max(1, _BLOCK * length // first.numel())
    memory = [first.new_empty((min(step, length), *first.shape[1:]), dtype=epsilon.dtype) for _ in range(buffers)]
    for start in range(0, length, step):
        parts = [tensor[start : start + step] for tensor in tensors]
        yield parts, [buffer[: parts[0].shape[0]] for buffer in memory]


def _wide(x: Tensor, buffer: Tensor) -> Tensor:
    """`x` in the dtype of the buffer, copied there if it must be converted."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def _bump(x: Tensor, moments: Tensor | None, t: Tensor, b: Tensor) -> None:
    """Sets b = (x − μ)·exp(−t²/2), t = (x − μ)/σ within the bump's support."""
    _standardised(x, moments, t)
    torch.mul(t, t, out=b).mul_(-0.5).exp_().mul_(t)
    if moments is not None:
        b.mul_(moments[1])


def _bump_and_slope(x: Tensor, epsilon: Tensor, moments: Tensor | None, t: Tensor, b: Tensor, slope: Tensor) -> None:
    """Sets b = (x − μ)·exp(−t²/2), slope = 1[x > 0] + ε·(1 − t²)·exp(−t²/2), t = (x − μ)/σ; t is overwritten."""
    _standardised(x, moments, t)
    torch.mul(t, t, out=slope)
    torch.mul(slope, -0.5, out=b).exp_()
    slope.neg_().add_(1).mul_(b).mul_(epsilon)
    b.mul_(t)
    if moments is not None:
        b.mul_(moments[1])
    slope.add_(torch.gt(x, 0, out=t))


def _standardised(x: Tensor, moments: Tensor | None, t: Tensor) -> None:
    """Sets t = (x − μ)/σ, within the bump's support: exp(−t²/2) is 0 beyond, and NaN stays NaN."""
    if moments is not None:
        torch.sub(x, moments[0], out=t).div_(moments[1])
    torch.clamp(x if moments is None else t, -SUPPORT, SUPPORT, out=t)
