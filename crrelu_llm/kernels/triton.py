"""CRReLU as Triton kernels, for CUDA and other GPUs: one forward pass, and one backward pass with the gradient of ε.

In the backward pass each program stores a partial sum of the ε gradient, and a second, small reduction adds the
partial sums: without atomics, the result is deterministic. Block sizes are fixed, not autotuned: nothing is timed at
run time, and a CUDA graph can be captured from the first call on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crrelu_llm.kernels.formula import SUPPORT

# Elements per program and step: 16 per thread, two 128-bit loads of bfloat16.
_TILE = 4096
_WARPS = 8
# Vertically adjacent tiles that one program of a per-channel backward pass sums before it stores its partial sums.
_TILES = 8
_SUPPORT = tl.constexpr(SUPPORT)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if triton.knobs.runtime.interpret:
        return None
    return None if device.type in ("cuda", "xpu") else f"no GPU ({device.type})"


@triton.jit
def _tile(pid, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """First row and first column of a program's tile, in 64 bits: a tensor may have more than 2³¹ elements."""
    across = tl.cdiv(columns, BLOCK_C)
    return (pid // across).to(tl.int64) * BLOCK_R, (pid % across).to(tl.int64) * BLOCK_C


@triton.jit
def _bump(t):
    """t·exp(−t²/2), its slope (1 − t²)·exp(−t²/2): 0 beyond the bump's support, NaN for NaN."""
    t = tl.where(tl.abs(t) > _SUPPORT, _SUPPORT, t)  # where both are exactly 0; at 0 the slope would be 1
    square = t * t
    bell = tl.exp(square * -0.5)
    return t * bell, bell - square * bell


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def _coefficient(pointer, column, offsets, mask, PER_CHANNEL: tl.constexpr):
    return tl.load(pointer + column + offsets, mask=mask, other=0.0)[None, :] if PER_CHANNEL else tl.load(pointer)


@triton.jit
def _four(pointer, columns, column, offsets, mask, PER_CHANNEL: tl.constexpr, AFFINE: tl.constexpr):
    """Scale, shift, gain and offset; placeholders, not used, if AFFINE is false."""
    if AFFINE:
        step = columns if PER_CHANNEL else 1  # with a single channel, the whole tensor may be one row
        scale = _coefficient(pointer, column, offsets, mask, PER_CHANNEL)
        shift = _coefficient(pointer + step, column, offsets, mask, PER_CHANNEL)
        gain = _coefficient(pointer + 2 * step, column, offsets, mask, PER_CHANNEL)
        offset = _coefficient(pointer + 3 * step, column, offsets, mask, PER_CHANNEL)
    else:
        scale = 1.0
        shift = 0.0
        gain = 1.0
        offset = 0.0
    return scale, shift, gain, offset


@triton.jit
def _forward(
    y_pointer, x_pointer, up_pointer, epsilon_pointer, affine_pointer, rows, columns, x_stride, up_stride,
    GATED: tl.constexpr, PER_CHANNEL: tl.constexpr, AFFINE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column = _tile(tl.program_id(0), rows, columns, BLOCK_R, BLOCK_C)
    row_offsets = tl.arange(0, BLOCK_R)
    column_offsets = tl.arange(0, BLOCK_C)
    column_mask = column + column_offsets < columns
    mask = (row + row_offsets < rows)[:, None] & column_mask[None, :]
    epsilon = _coefficient(epsilon_pointer, column, column_offsets, column_mask, PER_CHANNEL)
    r, c = row_offsets.to(tl.int64)[:, None], column_offsets[None, :]
    x = tl.load(x_pointer + row * x_stride + column + (r * x_stride + c), mask=mask, other=0.0).to(epsilon.dtype)
    scale, shift, gain, offset = _four(
        affine_pointer, columns, column, column_offsets, column_mask, PER_CHANNEL, AFFINE
    )
    if AFFINE:
        x = scale * (x + shift)
    bump, _ = _bump(x)
    y = _relu(x) + epsilon * bump
    if AFFINE:
        y = gain * y + offset
    if GATED:
        up = tl.load(up_pointer + row * up_stride + column + (r * up_stride + c), mask=mask, other=0.0)
        y *= up.to(epsilon.dtype)
    tl.store(y_pointer + row * columns + column + (r * columns + c), y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_x_pointer, grad_up_pointer, partial_pointer, grad_pointer, x_pointer, up_pointer, epsilon_pointer,
    affine_pointer, rows, columns, x_stride, up_stride, out_stride,
    GATED: tl.constexpr, PER_CHANNEL: tl.constexpr, AFFINE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first_row, column = _tile(pid, rows, columns, BLOCK_R * TILES, BLOCK_C)
    column_offsets = tl.arange(0, BLOCK_C)
    column_mask = column + column_offsets < columns
    epsilon = _coefficient(epsilon_pointer, column, column_offsets, column_mask, PER_CHANNEL)
    scale, shift, gain, offset = _four(
        affine_pointer, columns, column, column_offsets, column_mask, PER_CHANNEL, AFFINE
    )
    r, c = tl.arange(0, BLOCK_R).to(tl.int64)[:, None], column_offsets[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=epsilon.dtype)
    for tile in range(TILES):
        row = first_row + tile * BLOCK_R
        mask = (row + r < rows) & column_mask[None, :]
        x = tl.load(x_pointer + row * x_stride + column + (r * x_stride + c), mask=mask, other=0.0).to(epsilon.dtype)
        grad = tl.load(grad_pointer + row * columns + column + (r * columns + c), mask=mask, other=0.0)
        grad = grad.to(epsilon.dtype)
        if AFFINE:
            x = scale * (x + shift)
        bump, bump_slope = _bump(x)
        out = row * out_stride + column + (r * out_stride + c)
        if GATED:
            up = tl.load(up_pointer + row * up_stride + column + (r * up_stride + c), mask=mask, other=0.0)
            value = _relu(x) + epsilon * bump
            if AFFINE:
                value = gain * value + offset
            grad_up = grad * value
            tl.store(grad_up_pointer + out, grad_up.to(grad_up_pointer.dtype.element_ty), mask=mask)
            grad *= up.to(epsilon.dtype)
        grad_x = grad * (tl.where(x > 0, 1.0, 0.0) + epsilon * bump_slope)
        if AFFINE:
            grad_x *= gain * scale
        tl.store(grad_x_pointer + out, grad_x.to(grad_x_pointer.dtype.element_ty), mask=mask)
        total += grad * bump
    if PER_CHANNEL:
        part = (pid // tl.cdiv(columns, BLOCK_C)).to(tl.int64) * columns + column
        tl.store(partial_pointer + part + column_offsets, tl.sum(total, 0), mask=column_mask)
    else:
        tl.store(partial_pointer + pid, tl.sum(total))


def forward(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `eager.forward`."""
    y = torch.empty_like(x)
    _run_forward(y, x, None, epsilon, affine)
    return y


def gated_forward(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """See `eager.gated_forward`."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run_forward(y, gate, up, epsilon, affine)
    return y


def backward(grad: Tensor, x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `eager.backward`."""
    grad_x = torch.empty_like(x)
    return grad_x, _run_backward(grad_x, None, grad, x, None, epsilon, affine)


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, epsilon: Tensor, packed: bool, affine: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.gated_backward`."""
    if packed:
        both = grad.new_empty((grad.shape[0], 2 * grad.shape[1]))
        grad_gate, grad_up = both.chunk(2, dim=-1)
        return both, None, _run_backward(grad_gate, grad_up, grad, gate, up, epsilon, affine)
    grad_gate, grad_up = torch.empty_like(grad), torch.empty_like(grad)
    return grad_gate, grad_up, _run_backward(grad_gate, grad_up, grad, gate, up, epsilon, affine)


def _run_forward(y: Tensor, x: Tensor, up: Tensor | None, epsilon: Tensor, affine: Tensor | None) -> None:
    other = x if up is None else up
    if epsilon.numel() == 1 and x.is_contiguous() and other.is_contiguous():
        y, x, other = y.view(1, -1), x.view(1, -1), other.view(1, -1)  # full tiles for any shape
    rows, columns = x.shape
    block_r, block_c = _block(rows, columns)
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)
    with _on(x.device):
        _forward[grid](
            y, x, other, epsilon, epsilon if affine is None else affine,
            rows, columns, x.stride(0), other.stride(0),
            GATED=up is not None, PER_CHANNEL=epsilon.numel() > 1, AFFINE=affine is not None, BLOCK_R=block_r,
            BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip


def _run_backward(
    grad_x: Tensor,
    grad_up: Tensor | None,
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    epsilon: Tensor,
    affine: Tensor | None,
) -> Tensor:
    """Fills `grad_x` and, for a gated product, `grad_up` (same row stride); returns the gradient of ε."""
    per_channel = epsilon.numel() > 1
    other, other_out = (x, grad_x) if up is None or grad_up is None else (up, grad_up)
    tensors = (grad_x, other_out, grad, x, other)
    if not per_channel and all(tensor.is_contiguous() for tensor in tensors):
        grad_x, other_out, grad, x, other = (tensor.view(1, -1) for tensor in tensors)
    rows, columns = x.shape
    block_r, block_c = _block(rows, columns)
    tiles = _TILES if rows > block_r else 1
    down, across = triton.cdiv(rows, block_r * tiles), triton.cdiv(columns, block_c)
    partial = epsilon.new_empty((down, columns) if per_channel else (down * across,))
    with _on(x.device):
        _backward[(down * across,)](
            grad_x, other_out, partial, grad, x, other, epsilon,
            epsilon if affine is None else affine, rows, columns, x.stride(0), other.stride(0), grad_x.stride(0),
            GATED=up is not None, PER_CHANNEL=per_channel, AFFINE=affine is not None, TILES=tiles,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=_WARPS,
        )  # fmt: skip
    total = partial.sum(0) if per_channel else partial.sum(0, keepdim=True)
    return total if affine is None else total * affine[2]  # the gain is constant per channel, so the loop can omit it


def _block(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: as wide as allowed, and not much higher than the tensor."""
    width = min(_TILE if rows == 1 else _TILE // 4, triton.next_power_of_2(columns))
    return min(_TILE // width, triton.next_power_of_2(rows)), width


def _on(device: torch.device) -> torch.cuda.device:
    """Makes the tensor's device current, because kernels are launched on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
