"""CRReLU for users: the functions that check their input, and the `nn.Module` with a learnable ε. And what fits CRReLU
or any other activation to its place in a model: the four numbers a channel around it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from crrelu_llm import kernels
from crrelu_llm.errors import InputError
from crrelu_llm.kernels.recompute import note

# The buffers of a calibrated activation, which computes gain·f(scale·(x + shift)) + offset; and what they start from.
AFFINE = ("scale", "shift", "gain", "offset")
_START = {"scale": 1.0, "shift": 0.0, "gain": 1.0, "offset": 0.0}


def _check_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"crrelu: {name} must be a tensor, not {value!r}; wrap it: torch.tensor([...]).")
    if not value.is_floating_point():
        raise InputError(
            f"crrelu: {name} must be floating point, not {value.dtype}; convert it first: {name}.float()."
        )


def _check(x: Tensor, epsilon: Tensor) -> None:
    _check_float("x", x)
    _check_float("epsilon", epsilon)
    if epsilon.dim() == 1 and (epsilon.shape[0] == 1 or (x.dim() > 0 and epsilon.shape[0] == x.shape[-1])):
        return
    channels = _channels(x)
    allowed = "(1,)" if channels == 1 else f"(1,) or ({channels},)"
    raise InputError(
        f"crrelu: epsilon has shape {tuple(epsilon.shape)}, but x of shape {tuple(x.shape)} takes {allowed}; "
        f"give one ε, or one for each entry of the last dimension of x."
    )


def _check_up(gate: Tensor, up: Tensor) -> None:
    if not isinstance(up, Tensor) or up.shape != gate.shape or up.dtype != gate.dtype:
        about = f"{up.dtype} of {tuple(up.shape)}" if isinstance(up, Tensor) else repr(up)
        raise InputError(f"crrelu: up must be like gate, {gate.dtype} of {tuple(gate.shape)}, not {about}.")


def _channels(x: Tensor) -> int:
    return x.shape[-1] if x.dim() > 0 else 1


def _checked_affine(x: Tensor, affine: Tensor | None) -> Tensor | None:
    if affine is None:
        return None
    _check_float("affine", affine)
    if affine.shape != (len(AFFINE), _channels(x)):
        raise InputError(
            f"crrelu: affine has shape {tuple(affine.shape)}, but x of shape {tuple(x.shape)} takes "
            f"({len(AFFINE)}, {_channels(x)}); give the rows {', '.join(AFFINE)}, with one value for each entry of "
            "the last dimension of x."
        )
    return affine.detach()


def crrelu(x: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Computes `f(x) = max(0, x) + ε·x·exp(−x²/2)` elementwise (arXiv 2405.12954).

    With `affine` it computes `gain·f(scale·(x + shift)) + offset`, each of the four one number a channel. The
    computation runs in float32 (float64 for a float64 `x`) whatever the dtypes are, and only the inputs are kept for
    the backward pass. The value of f at ±inf is relu(x); NaN stays NaN.

    Args:
        x: floating point, any shape; with one ε a channel or with `affine`, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: floating point, `(4, channels)`, the rows scale, shift, gain and offset; gets no gradient.

    Returns:
        Shape and dtype of `x`.

    Raises:
        InputError: An input is no floating-point tensor, or the shape of one does not fit.
    """
    _check(x, epsilon)
    return kernels.crrelu(x, epsilon, _checked_affine(x, affine))


def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Computes `crrelu(gate, epsilon, affine) · up`, the product of a gated MLP, in one pass.

    The computation runs in float32 (float64 for float64) and is rounded once; only the inputs are kept for the
    backward pass. Where `gate` and `up` are the halves of one tensor, its gradient is written in one piece.

    Args:
        gate: floating point, any shape; with one ε a channel or with `affine`, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: as for `crrelu`.

    Returns:
        Shape and dtype of `gate`.

    Raises:
        InputError: An input as for `crrelu`, or `up` is not like `gate`.
    """
    _check(gate, epsilon)
    _check_up(gate, up)
    return kernels.crrelu_gated(gate, up, epsilon, _checked_affine(gate, affine))


def surrounded(function: Callable[[Tensor], Tensor], x: Tensor, four: Sequence[Tensor]) -> Tensor:
    """Computes `gain·function(scale·(x + shift)) + offset` in several passes, differentiable in everything.

    Args:
        function: elementwise; is given and gives float32, float64 for a float64 `x`.
        x: floating point, `(..., channels)`, any shape where there are none of the four.
        four: scale, shift, gain and offset, `(channels,)` each; or empty: `function` alone.

    Returns:
        Shape of `x`, float32 or float64: not rounded to the dtype of `x`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not four:
        return function(x.to(wide))
    scale, shift, gain, offset = (part.to(wide) for part in four)
    return gain * function(scale * (x.to(wide) + shift)) + offset


def _learned(x: Tensor, epsilon: Tensor, *four: Tensor) -> Tensor:
    return surrounded(lambda t: kernels.crrelu(t, epsilon), x, four).to(x.dtype)


def _learned_gated(gate: Tensor, up: Tensor, epsilon: Tensor, *four: Tensor) -> Tensor:
    value = surrounded(lambda t: kernels.crrelu(t, epsilon), gate, four)
    return (value * up.to(value.dtype)).to(gate.dtype)


class AffineModule(nn.Module):
    """What CRReLU and `Calibrated` share: the buffers that calibration sets, float32 whatever is cast around them.

    The four of `AFFINE`, of shape `(channels,)`, are None where nothing is calibrated. They start at 1, 0, 1, 0, are
    in the state dict, and are left float32 by a cast: nothing that trains would bring back the digits.
    """

    scale: Tensor | None
    shift: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    _float32: tuple[str, ...] = AFFINE

    def _add_buffers(self, names: Iterable[str], size: int | None, device: torch.device | str | None) -> None:
        """Registers buffers of `(size,)`, not filled; None for each where there is no size."""
        for name in names:
            # .float(): while ZeRO-3 builds a model, torch.empty gives its dtype, whatever is asked for.
            value = None if size is None else torch.empty(size, dtype=torch.float32, device=device).float()
            self.register_buffer(name, value)

    @property
    def is_calibrated(self) -> bool:
        """Whether it has the four."""
        return self.scale is not None

    @property
    def start_values(self) -> dict[str, float]:
        """What its own parameters and buffers start from, by name."""
        return dict(_START) if self.is_calibrated else {}

    def reset_parameters(self, names: Iterable[str] | None = None) -> None:
        """Sets its own parameters and buffers to their start values, or only those of these names."""
        start = self.start_values
        # Not nn.init.constant_: transformers turns the nn.init functions off while it builds a model.
        with torch.no_grad():
            for name in start if names is None else names:
                getattr(self, name).fill_(start[name])

    def train_affine(self) -> None:
        """Makes the four trainable: parameters of the same names, still float32. Does nothing where they are.

        CRReLU then gives gradients to them too, in several passes, which keep more for the backward pass than x.

        Raises:
            InputError: It is not calibrated.
        """
        if not self.is_calibrated:
            raise InputError(f"{type(self).__name__}: there is no {', '.join(AFFINE)} to train; it is not calibrated.")
        for name in AFFINE:
            value = getattr(self, name)
            if not isinstance(value, nn.Parameter):
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Loads that are not strict leave out what has no place, PEFT's among them, and the model would be another one.
        *_, unexpected, _ = args
        wrapper = prefix.partition("modules_to_save.")[0]  # PEFT's, where the names of an adapter end
        found = [name for name in AFFINE if prefix + name in state_dict or wrapper + name in unexpected]
        if found and not self.is_calibrated:
            raise InputError(
                f"{wrapper.rstrip('.')}: what is loaded has {', '.join(found)} for it, and the model has not, so it "
                "was patched without calibration; load the checkpoint that these belong to"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _four(self) -> list[Tensor]:
        return [getattr(self, name) for name in AFFINE] if self.is_calibrated else []

    def _check_channels(self, x: Tensor) -> None:
        if self.scale is not None and self.scale.shape[0] != _channels(x):
            raise InputError(
                f"{type(self).__name__}: calibrated for {self.scale.shape[0]} channels, but x has shape "
                f"{tuple(x.shape)}; its last dimension must be the channels."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.bfloat16()`, … do to it; the buffers go along to the device, but stay float32."""
        before = {name: value.detach() for name in self._float32 if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype.itemsize >= value.dtype.itemsize:
                continue
            if isinstance(now, nn.Parameter):
                gradient, now.grad = now.grad, None
                now.data = value.to(now.device)
                now.grad = None if gradient is None else gradient.to(value.dtype)
            else:
                setattr(self, name, value.to(now.device))
        return self


class CRReLU(AffineModule):
    """CRReLU with a learnable ε, one for the whole module or one a channel.

    The parameter `epsilon` is created in float32 even where torch's default dtype is lower, as it is while
    transformers builds a bfloat16 model: in bfloat16 an ε of 0.01 ignores updates of 1e-5. `module.to(dtype)`
    casts ε like every other parameter; a lower-precision ε is widened for the computation, but no longer learns
    small updates.

    A calibrated one also has the buffers `scale`, `shift`, `gain` and `offset`, float32, one value a channel, and
    computes `gain·f(scale·(x + shift)) + offset`. They start at 1, 0, 1 and 0, and a cast leaves them float32.

    Args:
        num_channels: size of the last dimension of the input for one ε a channel; `None` for a single ε.
        epsilon_init: start value of ε, 0.01 in the paper.
        device: where the parameter is created.
        calibrated: size of the last dimension of the input, for the four buffers; `None` for none.

    Raises:
        InputError: `num_channels` or `calibrated` is less than 1, or they differ.
    """

    def __init__(
        self,
        num_channels: int | None = None,
        epsilon_init: float = 0.01,
        device: torch.device | str | None = None,
        calibrated: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_channels", num_channels), ("calibrated", calibrated)):
            if size is not None and size < 1:
                what = "a single ε" if name == "num_channels" else "no buffers"
                raise InputError(f"CRReLU: {name} must be at least 1, not {size}; None means {what}.")
        if None not in (num_channels, calibrated) and num_channels != calibrated:
            raise InputError(
                f"CRReLU: num_channels is {num_channels} and calibrated {calibrated}; both are the size of the last "
                "dimension of the input."
            )
        self.num_channels = num_channels
        self.epsilon_init = epsilon_init
        # 1-D also for a single ε: FSDP2 and ZeRO refuse 0-dimensional parameters.
        self.epsilon = nn.Parameter(torch.empty(num_channels or 1, dtype=torch.float32, device=device))
        self._add_buffers(AFFINE, calibrated, device)
        self.reset_parameters()

    @property
    def start_values(self) -> dict[str, float]:
        """What its parameter and buffers start from, by name."""
        return {"epsilon": self.epsilon_init, **super().start_values}

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """Applies CRReLU to `x`, shape `(..., num_channels)` or, with a single ε, any; see `crrelu`.

        With `up`, of the same shape, it gives the product of the two, in one pass; see `crrelu_gated`. A hook on this
        module in a patched gated MLP therefore sees two arguments, gate and up, and their product.
        """
        if up is not None and up.dtype != x.dtype:
            return self(x) * up
        _check(x, self.epsilon)
        if up is not None:
            _check_up(x, up)
        self._check_channels(x)
        return self._compute(*((x,) if up is None else (x, up)))

    def _compute(self, *inputs: Tensor) -> Tensor:
        four = self._four()
        functions: tuple[Callable[..., Tensor], ...] = (kernels.crrelu, kernels.crrelu_gated)
        if any(part.requires_grad for part in four):
            functions = (_learned, _learned_gated)
        elif four:
            # Copied each time, a small operation: whoever changes them, by whatever way, has nothing to tell, and may
            # do so between the forward and the backward pass.
            four = [torch.stack(four)]
        function, arguments = functions[len(inputs) - 1], (*inputs, self.epsilon, *four)
        y = function(*arguments)
        note(y, function, *arguments)
        return y

    def extra_repr(self) -> str:
        calibrated = f", calibrated={len(self.scale)}" if self.scale is not None else ""
        return f"num_channels={self.num_channels}, epsilon_init={self.epsilon_init}{calibrated}"


class Calibrated(AffineModule):
    """Any elementwise activation f with the four around it: `gain·f(scale·(x + shift)) + offset`.

    Scale, shift, gain and offset are float32 buffers of one value a channel; they start at 1, 0, 1 and 0, and a cast
    leaves them float32. The computation runs in float32 (float64 for a float64 `x`) and is rounded once. While it
    trains, f is given float32 and keeps what it keeps of that: for a low-precision `x` twice what f alone would.

    Args:
        activation: f; a child module of this name. Parameters of a lower precision are widened for the computation.
        num_channels: size of the last dimension of the input.
        device: where the buffers are created.

    Raises:
        InputError: `num_channels` is less than 1.
    """

    def __init__(self, activation: nn.Module, num_channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if num_channels < 1:
            raise InputError(f"Calibrated: num_channels must be at least 1, not {num_channels}.")
        self.num_channels = num_channels
        self.activation = activation
        self._add_buffers(AFFINE, num_channels, device)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Applies it to `x`, `(..., num_channels)`, floating point; the result has the shape and dtype of `x`.

        Raises:
            InputError: `x` is no floating-point tensor, or has another number of channels.
        """
        _check_float("x", x)
        self._check_channels(x)
        return surrounded(self._inner, x, self._four()).to(x.dtype)

    def _inner(self, t: Tensor) -> Tensor:
        narrow = {
            name: value.to(t.dtype)
            for name, value in (*self.activation.named_parameters(), *self.activation.named_buffers())
            if value.is_floating_point() and value.dtype != t.dtype
        }
        if narrow:  # torch's PReLU, for one, takes no other dtype than its own
            return torch.func.functional_call(self.activation, narrow, (t,))
        return self.activation(t)

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}"
