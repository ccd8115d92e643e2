"""CRReLU for users: the functions that check their input, and the `nn.Module` with a learnable ε."""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import nn

from crrelu_llm import kernels
from crrelu_llm.errors import InputError
from crrelu_llm.kernels.recompute import note

# The buffers of a fitted one.
MOMENTS = ("center", "width")


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


def _check_pair(gate: torch.Tensor, up: torch.Tensor, epsilon: torch.Tensor) -> None:
    _check(gate, epsilon)
    if not isinstance(up, torch.Tensor) or up.shape != gate.shape or up.dtype != gate.dtype:
        about = f"{up.dtype} of {tuple(up.shape)}" if isinstance(up, torch.Tensor) else repr(up)
        raise InputError(f"crrelu: up must be like gate, {gate.dtype} of {tuple(gate.shape)}, not {about}.")


def _moments(epsilon: torch.Tensor, center: torch.Tensor | None, width: torch.Tensor | None) -> torch.Tensor | None:
    """The two in one tensor, as the kernels take them."""
    if center is None and width is None:
        return None
    for name, value in (("center", center), ("width", width)):
        if not isinstance(value, torch.Tensor) or value.shape not in ((1,), epsilon.shape):
            about = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(
                f"crrelu: {name} must be a tensor of shape (1,) or that of epsilon, {tuple(epsilon.shape)}, not "
                f"{about}; give center and width both, or neither."
            )
    assert center is not None and width is not None
    return torch.stack([part.detach().expand_as(epsilon) for part in (center, width.to(center.dtype))])


def crrelu(
    x: torch.Tensor, epsilon: torch.Tensor, center: torch.Tensor | None = None, width: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes `max(0, x) + ε·x·exp(−x²/2)` elementwise (arXiv 2405.12954).

    With a centre μ and a width σ it computes `max(0, x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`, the correction that the
    paper's method gives for inputs of density N(μ, σ²); without them μ = 0, σ = 1. The computation runs in float32
    (float64 for a float64 `x`) whatever the dtypes are, and only the inputs are kept for the backward pass. The value
    at ±inf is relu(x); NaN stays NaN.

    Args:
        x: floating point, any shape; with one ε a channel, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        center: floating point, shape `(1,)` or that of `epsilon`; gets no gradient.
        width: the same, positive.

    Returns:
        Shape and dtype of `x`.

    Raises:
        InputError: `x` or `epsilon` is no floating-point tensor, or the shape of one does not fit.
    """
    _check(x, epsilon)
    return kernels.crrelu(x, epsilon, _moments(epsilon, center, width))


def crrelu_gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    epsilon: torch.Tensor,
    center: torch.Tensor | None = None,
    width: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `crrelu(gate, epsilon, center, width) · up`, the product of a gated MLP, in one pass.

    The computation runs in float32 (float64 for float64) and is rounded once; only the inputs are kept for the
    backward pass. Where `gate` and `up` are the halves of one tensor, its gradient is written in one piece.

    Args:
        gate: floating point, any shape; with one ε a channel, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        center: as for `crrelu`.
        width: as for `crrelu`.

    Returns:
        Shape and dtype of `gate`.

    Raises:
        InputError: An input as for `crrelu`, or `up` is not like `gate`.
    """
    _check_pair(gate, up, epsilon)
    return kernels.crrelu_gated(gate, up, epsilon, _moments(epsilon, center, width))


class CRReLU(nn.Module):
    """CRReLU with a learnable ε, one for the whole module or one a channel.

    The parameter `epsilon` is created in float32 even where torch's default dtype is lower, as it is while
    transformers builds a bfloat16 model: in bfloat16 an ε of 0.01 ignores updates of 1e-5. `module.to(dtype)`
    casts ε like every other parameter; a lower-precision ε is widened for the computation, but no longer learns
    small updates.

    A fitted one also has the buffers `center` and `width`, float32, `(1,)`: the mean μ and the standard deviation σ of
    its inputs, as measured. Its bump is then `(x − μ)·exp(−(x − μ)²/2σ²)`. They start at 0 and 1, and are left float32
    by a cast: nothing that trains would bring back the digits.

    Args:
        num_channels: size of the last dimension of the input for one ε a channel; `None` for a single ε.
        epsilon_init: start value of ε, 0.01 in the paper.
        device: where the parameter is created.
        fitted: Whether it has a centre and a width; else both are None.

    Raises:
        InputError: `num_channels` is less than 1.
    """

    def __init__(
        self,
        num_channels: int | None = None,
        epsilon_init: float = 0.01,
        device: torch.device | str | None = None,
        fitted: bool = False,
    ) -> None:
        super().__init__()
        if num_channels is not None and num_channels < 1:
            raise InputError(f"CRReLU: num_channels must be at least 1, not {num_channels}; None means a single ε.")
        self.num_channels = num_channels
        self.epsilon_init = epsilon_init
        # 1-D also for a single ε: FSDP2 and ZeRO refuse 0-dimensional parameters.
        self.epsilon = nn.Parameter(torch.empty(num_channels or 1, dtype=torch.float32, device=device))
        for name in MOMENTS:
            # .float(): while ZeRO-3 builds a model, torch.empty gives its dtype, whatever is asked for.
            self.register_buffer(name, torch.empty(1, dtype=torch.float32, device=device).float() if fitted else None)
        self.center: torch.Tensor | None
        self.width: torch.Tensor | None
        self.reset_parameters()

    @property
    def start_values(self) -> dict[str, float]:
        """What its parameter and buffers start from, by name."""
        moments = {"center": 0.0, "width": 1.0} if self.fitted else {}
        return {"epsilon": self.epsilon_init, **moments}

    def reset_parameters(self, names: Iterable[str] | None = None) -> None:
        """Sets ε, centre and width to their start values, or only those of these names."""
        start = self.start_values
        # Not nn.init.constant_: transformers turns the nn.init functions off while it builds a model.
        with torch.no_grad():
            for name in start if names is None else names:
                getattr(self, name).fill_(start[name])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.bfloat16()`, … do to it; the moments go along to the device, but stay float32."""
        before = {name: getattr(self, name) for name in MOMENTS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and getattr(self, name).dtype.itemsize < value.dtype.itemsize:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def fitted(self) -> bool:
        """Whether it has a centre and a width of its own."""
        return self.center is not None

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Applies CRReLU to `x`, shape `(..., num_channels)` or, with a single ε, any; see `crrelu`.

        With `up`, of the same shape, it gives the product of the two, in one pass; see `crrelu_gated`. A hook on this
        module in a patched gated MLP therefore sees two arguments, gate and up, and their product.
        """
        if up is not None and up.dtype != x.dtype:
            return self(x) * up
        # Copied, so that they may be moved between the forward and the backward pass.
        extra: tuple[torch.Tensor, ...] = ()
        if self.center is not None and self.width is not None:
            extra = (torch.stack((self.center, self.width)).expand(2, self.epsilon.numel()),)
        if up is None:
            _check(x, self.epsilon)
            y = kernels.crrelu(x, self.epsilon, *extra)
            note(y, kernels.crrelu, x, self.epsilon, *extra)
        else:
            _check_pair(x, up, self.epsilon)
            y = kernels.crrelu_gated(x, up, self.epsilon, *extra)
            note(y, kernels.crrelu_gated, x, up, self.epsilon, *extra)
        return y

    def extra_repr(self) -> str:
        fitted = ", fitted=True" if self.fitted else ""
        return f"num_channels={self.num_channels}, epsilon_init={self.epsilon_init}{fitted}"
