"""The definition of CRReLU in plain torch: the formula word for word, the baseline that every other backend is
measured against."""

import torch


def crrelu(x: torch.Tensor, epsilon: torch.Tensor, moments: torch.Tensor | None = None) -> torch.Tensor:
    """Evaluates `f(x) = relu(x) + ε·x·exp(−x²/2)` in the dtype of `x`, differentiated by autograd.

    With moments μ and σ it is `relu(x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`, the correction for the density N(μ, σ²).

    It is the formula as it stands, with its numerical faults: NaN at ±inf (inf·0), rounding of every step in the
    storage dtype, and several saved intermediates. Use it to check other backends, not to train.

    Args:
        x: floating point, any shape; with a per-channel ε, `(..., channels)`.
        epsilon: shape `(1,)` or `(channels,)`; converted to the dtype of `x`.
        moments: μ and σ, shape `(2, 1)` or `(2, channels)`; converted likewise. None: 0 and 1.

    Returns:
        Shape and dtype of `x`.
    """
    # A single ε becomes 0-dimensional, so that it never adds a dimension to a 0-dimensional x.
    epsilon = epsilon.to(x.dtype).squeeze()
    if moments is None:
        return torch.relu(x) + epsilon * x * torch.exp(-x * x / 2)
    center, width = (part.squeeze() for part in moments.to(x.dtype))
    t = (x - center) / width
    return torch.relu(x) + epsilon * (x - center) * torch.exp(-t * t / 2)
