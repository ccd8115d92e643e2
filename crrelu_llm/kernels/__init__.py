"""The backends of CRReLU by name, and the dispatch to the one in use."""

import torch

from crrelu_llm.kernels import eager, reference

BACKENDS = {"reference": reference.crrelu, "eager": eager.crrelu}


def crrelu(x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Evaluates CRReLU with the eager backend. Checks nothing: see `crrelu_llm.activation.crrelu`.

    Args:
        x: floating point, any shape; with a per-channel ε, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `x`.
    """
    return eager.crrelu(x, epsilon)
