"""The formula in plain differentiable torch, correct at 0, ±inf and NaN: for torch.func, second derivatives, and
compiled models, which trace and fuse it."""

import torch
from torch import Tensor

# exp(−t²/2) is exactly 0 at |t| = 40, even in float64 (its last subnormal is at 38.6). Setting the bump to 0 beyond
# that changes no value, and avoids inf·0 = NaN for an infinite x. NaN is not beyond it, and passes through.
SUPPORT = 40.0


def widen(x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """`x` and ε in the dtype of the computation: float64 for a float64 `x`, else float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # A single ε becomes 0-dimensional, so that it never adds a dimension to a 0-dimensional x (as under vmap).
    return x.to(wide), epsilon.to(wide).squeeze()


def _wide(x: Tensor, epsilon: Tensor, affine: Tensor | None) -> Tensor:
    if affine is None:
        t = torch.where(x.abs() > SUPPORT, 0.0, x)
        return torch.addcmul(torch.relu(x), epsilon, t * torch.exp(t.square() * -0.5))
    scale, shift, gain, offset = (part.squeeze() for part in affine.to(x.dtype).unbind())
    return torch.addcmul(offset, _wide((x + shift) * scale, epsilon, None), gain)


def crrelu(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """CRReLU for `x` of any shape, ε `(1,)` or `(channels,)` and `affine` `(4, channels)`; returns the shape and dtype
    of `x`."""
    return _wide(*widen(x, epsilon), affine).to(x.dtype)


def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """CRReLU(gate)·up, rounded once; both tensors and the result have the same shape and dtype."""
    wide, wide_epsilon = widen(gate, epsilon)
    return (_wide(wide, wide_epsilon, affine) * up.to(wide.dtype)).to(gate.dtype)


def crrelu_packed(gate_up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """CRReLU(gate)·up for `(..., 2·channels)`, the gate's channels first; returns `(..., channels)`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return crrelu_gated(gate, up, epsilon, affine)
