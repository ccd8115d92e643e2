"""The definition of CRReLU in plain torch: the literal formula, against which every other backend is measured."""

import torch


def crrelu(x: torch.Tensor, epsilon: torch.Tensor, affine: torch.Tensor | None = None) -> torch.Tensor:
    """Evaluates `f(x) = relu(x) + ε·x·exp(−x²/2)` in the dtype of `x`, differentiated by autograd.

    With `affine` it evaluates `gain·f(scale·(x + shift)) + offset`.

    The literal formula has numerical faults: NaN at ±inf (inf·0), rounding of every step in the storage dtype, and
    several saved intermediates. Use it to check other backends, not to train.

    Args:
        x: floating point, any shape; with a per-channel ε, `(..., channels)`.
        epsilon: shape `(1,)` or `(channels,)`; converted to the dtype of `x`.
        affine: scale, shift, gain and offset, `(4, channels)`; converted likewise. None: f alone.

    Returns:
        Shape and dtype of `x`.
    """
    # A single ε becomes 0-dimensional, so that it never adds a dimension to a 0-dimensional x.
    epsilon = epsilon.to(x.dtype).squeeze()
    if affine is None:
        return torch.relu(x) + epsilon * x * torch.exp(-x * x / 2)
    scale, shift, gain, offset = (part.squeeze() for part in affine.to(x.dtype))
    t = scale * (x + shift)
    return gain * (torch.relu(t) + epsilon * t * torch.exp(-t * t / 2)) + offset
