"""CRReLU for users: the functions that check their input, and the `nn.Module` with a learnable ε."""

import torch
from torch import nn

from crrelu_llm import kernels
from crrelu_llm.errors import InputError
from crrelu_llm.kernels.recompute import note


def _check(x: torch.Tensor, epsilon: torch.Tensor) -> None:
    for name, value in (("x", x), ("epsilon", epsilon)):
        if not isinstance(value, torch.Tensor):
            raise InputError(f"crrelu: {name} must be a tensor, not {value!r}; wrap it: torch.tensor([...]).")
        if not value.is_floating_point():
            raise InputError(
                f"crrelu: {name} must be floating point, not {value.dtype}; convert it first: {name}.float()."
            )
    if epsilon.dim() == 1 and (epsilon.shape[0] == 1 or (x.dim() > 0 and epsilon.shape[0] == x.shape[-1])):
        return
    channels = x.shape[-1] if x.dim() > 0 else 1
    allowed = "(1,)" if channels == 1 else f"(1,) or ({channels},)"
    raise InputError(
        f"crrelu: epsilon has shape {tuple(epsilon.shape)}, but x of shape {tuple(x.shape)} takes {allowed}; "
        f"give one ε, or one for each entry of the last dimension of x."
    )


def crrelu(x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Computes `max(0, x) + ε·x·exp(−x²/2)` elementwise (arXiv 2405.12954).

    The computation runs in float32 (float64 for a float64 `x`) whatever the dtypes of `x` and `epsilon` are, and
    only `x` and `epsilon` are kept for the backward pass. The value at ±inf is relu(x); NaN stays NaN.

    Args:
        x: floating point, any shape; with one ε a channel, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        InputError: `x` or `epsilon` is no floating-point tensor, or the shape of `epsilon` does not fit.
    """
    _check(x, epsilon)
    return kernels.crrelu(x, epsilon)


def crrelu_gated(gate: torch.Tensor, up: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Computes `crrelu(gate, epsilon) · up`, the product of a gated MLP, in one pass.

    The computation runs in float32 (float64 for float64) and is rounded once; only the three inputs are kept for the
    backward pass. Where `gate` and `up` are the halves of one tensor, its gradient is written in one piece.

    Args:
        gate: floating point, any shape; with one ε a channel, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.

    Returns:
        Shape and dtype of `gate`.

    Raises:
        InputError: `gate` or `epsilon` as for `crrelu`, or `up` is not like `gate`.
    """
    _check(gate, epsilon)
    if not isinstance(up, torch.Tensor) or up.shape != gate.shape or up.dtype != gate.dtype:
        about = f"{up.dtype} of {tuple(up.shape)}" if isinstance(up, torch.Tensor) else repr(up)
        raise InputError(f"crrelu: up must be like gate, {gate.dtype} of {tuple(gate.shape)}, not {about}.")
    return kernels.crrelu_gated(gate, up, epsilon)


class CRReLU(nn.Module):
    """CRReLU with a learnable ε, one for the whole module or one a channel.

    The parameter `epsilon` is created in float32 even where torch's default dtype is lower, as it is while
    transformers builds a bfloat16 model: in bfloat16 an ε of 0.01 ignores updates of 1e-5. `module.to(dtype)`
    casts ε like every other parameter; a lower-precision ε is widened for the computation, but no longer learns
    small updates.

    Args:
        num_channels: size of the last dimension of the input for one ε a channel; `None` for a single ε.
        epsilon_init: start value of ε, 0.01 in the paper.
        device: where the parameter is created.

    Raises:
        InputError: `num_channels` is less than 1.
    """

    def __init__(
        self,
        num_channels: int | None = None,
        epsilon_init: float = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_channels is not None and num_channels < 1:
            raise InputError(f"CRReLU: num_channels must be at least 1, not {num_channels}; None means a single ε.")
        self.num_channels = num_channels
        self.epsilon_init = epsilon_init
        # 1-D also for a single ε: FSDP2 and ZeRO refuse 0-dimensional parameters.
        self.epsilon = nn.Parameter(torch.empty(num_channels or 1, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every ε to `epsilon_init`."""
        # Not nn.init.constant_: transformers turns the nn.init functions off while it builds a model.
        with torch.no_grad():
            self.epsilon.fill_(self.epsilon_init)

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Applies CRReLU to `x`, shape `(..., num_channels)` or, with a single ε, any; see `crrelu`.

        With `up`, of the same shape, it gives the product of the two, in one pass; see `crrelu_gated`. A hook on this
        module in a patched gated MLP therefore sees two arguments, gate and up, and their product.
        """
        if up is not None and up.dtype != x.dtype:
            return self(x) * up
        if up is None:
            y = crrelu(x, self.epsilon)
            note(y, kernels.crrelu, x, self.epsilon)
        else:
            y = crrelu_gated(x, up, self.epsilon)
            note(y, kernels.crrelu_gated, x, up, self.epsilon)
        return y

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}, epsilon_init={self.epsilon_init}"
