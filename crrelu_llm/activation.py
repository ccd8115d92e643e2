"""The public CRReLU: functions that check their input, and the `nn.Module` with a learnable ε. Also the calibrated
form of any activation, with scale, shift, gain and offset per channel (the four) around it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from crrelu_llm import kernels
from crrelu_llm.errors import InputError
from crrelu_llm.kernels.recompute import note

# The buffers of a calibrated activation, which computes gain·f(scale·(x + shift)) + offset, and their start values.
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

    With `affine` it computes `gain·f(scale·(x + shift)) + offset`, with one value of each of the four per channel. The
    computation runs in float32 (float64 for a float64 `x`) whatever the dtypes are, and only the inputs are stored for
    the backward pass. The value of f at ±inf is relu(x); NaN stays NaN.

    Args:
        x: floating point, any shape; with one ε per channel or with `affine`, `(..., channels)`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: floating point, `(4, channels)`, the rows scale, shift, gain and offset; gets no gradient.

    Returns:
        Shape and dtype of `x`.

    Raises:
        InputError: An input is not a floating-point tensor, or has the wrong shape.
    """
    _check(x, epsilon)
    return kernels.crrelu(x, epsilon, _checked_affine(x, affine))


def crrelu_gated(gate: Tensor, up: Tensor, epsilon: Tensor, affine: Tensor | None = None) -> Tensor:
    """Computes `crrelu(gate, epsilon, affine) · up`, the product of a gated MLP, in one pass.

    The computation runs in float32 (float64 for float64) and is rounded once; only the inputs are stored for the
    backward pass. If `gate` and `up` are the halves of one tensor, its gradient is written in one piece.

    Args:
        gate: floating point, any shape; with one ε per channel or with `affine`, `(..., channels)`.
        up: shape and dtype of `gate`.
        epsilon: floating point, shape `(1,)` or `(channels,)`.
        affine: as for `crrelu`.

    Returns:
        Shape and dtype of `gate`.

    Raises:
        InputError: As for `crrelu`, or `up` is not like `gate`.
    """
    _check(gate, epsilon)
    _check_up(gate, up)
    return kernels.crrelu_gated(gate, up, epsilon, _checked_affine(gate, affine))


def surrounded(function: Callable[[Tensor], Tensor], x: Tensor, four: Sequence[Tensor]) -> Tensor:
    """Computes `gain·function(scale·(x + shift)) + offset` in several passes, differentiable in every input.

    Args:
        function: elementwise; receives and returns float32, or float64 for a float64 `x`.
        x: floating point, `(..., channels)`; any shape without the four.
        four: scale, shift, gain and offset, `(channels,)` each; or empty for `function` alone.

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
    """The base class of CRReLU and `Calibrated`: the buffers set by calibration, which stay float32 in every cast.

    The four buffers of `AFFINE`, of shape `(channels,)`, are None without calibration. They start at 1, 0, 1, 0 and
    are in the state dict. A cast leaves them float32, because no training would restore the lost digits.
    """

    scale: Tensor | None
    shift: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    _float32: tuple[str, ...] = AFFINE

    def _add_buffers(self, names: Iterable[str], size: int | None, device: torch.device | str | None) -> None:
        """Registers uninitialised buffers of shape `(size,)`, or None for each without a size."""
        for name in names:
            # .float(): while ZeRO-3 builds a model, torch.empty ignores the dtype and uses ZeRO-3's.
            value = None if size is None else torch.empty(size, dtype=torch.float32, device=device).float()
            self.register_buffer(name, value)

    @property
    def is_calibrated(self) -> bool:
        """Whether the activation has the four."""
        return self.scale is not None

    @property
    def start_values(self) -> dict[str, float]:
        """The start values of the module's own parameters and buffers, by name."""
        return dict(_START) if self.is_calibrated else {}

    def reset_parameters(self, names: Iterable[str] | None = None) -> None:
        """Sets the module's own parameters and buffers, or only the named ones, to their start values."""
        start = self.start_values
        # Not nn.init.constant_: transformers disables the nn.init functions while it builds a model.
        with torch.no_grad():
            for name in start if names is None else names:
                getattr(self, name).fill_(start[name])

    def train_affine(self) -> None:
        """Makes the four trainable, as float32 parameters of the same names. Does nothing if they already are.

        CRReLU then computes their gradients too, in several passes, and stores more than x for the backward pass.

        Raises:
            InputError: The activation is not calibrated.
        """
        if not self.is_calibrated:
            raise InputError(f"{type(self).__name__}: there is no {', '.join(AFFINE)} to train; it is not calibrated.")
        for name in AFFINE:
            value = getattr(self, name)
            if not isinstance(value, nn.Parameter):
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A load that is not strict, such as PEFT's, would silently drop these values and change the model.
        *_, unexpected, _ = args
        wrapper = prefix.partition("modules_to_save.")[0]  # PEFT's wrapper, where the names in an adapter end
        found = [name for name in AFFINE if prefix + name in state_dict or wrapper + name in unexpected]
        if found and not self.is_calibrated:
            raise InputError(
                f"{wrapper.rstrip('.')}: the loaded state has {', '.join(found)} for it, but the model was patched "
                "without calibration; load the matching checkpoint"
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
        """Implements `.to()`, `.bfloat16()`, …: the buffers move to the device, but stay float32."""
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
    """CRReLU with a learnable ε, one for the whole module or one per channel.

    The parameter `epsilon` is created in float32 even if torch's default dtype is lower, as while transformers builds
    a bfloat16 model: in bfloat16 an ε of 0.01 ignores updates of 1e-5. `module.to(dtype)` casts ε like every other
    parameter; a lower-precision ε is widened for the computation, but no longer learns small updates.

    A calibrated CRReLU also has the float32 buffers `scale`, `shift`, `gain` and `offset`, one value per channel, and
    computes `gain·f(scale·(x + shift)) + offset`. They start at 1, 0, 1 and 0, and a cast leaves them float32.

    Args:
        num_channels: size of the last dimension of the input for one ε per channel; `None` for a single ε.
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
        # A single ε is 1-D too: FSDP2 and ZeRO refuse 0-dimensional parameters.
        self.epsilon = nn.Parameter(torch.empty(num_channels or 1, dtype=torch.float32, device=device))
        self._add_buffers(AFFINE, calibrated, device)
        self.reset_parameters()

    @property
    def start_values(self) -> dict[str, float]:
        """The start values of the parameter and buffers, by name."""
        return {"epsilon": self.epsilon_init, **super().start_values}

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """Applies CRReLU to `x`, shape `(..., num_channels)` or, with a single ε, any; see `crrelu`.

        With `up`, of the same shape, it returns the product with `up` in one pass; see `crrelu_gated`. A hook on this
        module in a patched gated MLP therefore sees two arguments, gate and up, and the product as output.
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
            # Copied on every call, which is cheap: the buffers may be changed in any way without notice, even between
            # the forward and the backward pass.
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

    Scale, shift, gain and offset are float32 buffers with one value per channel; they start at 1, 0, 1 and 0, and a
    cast leaves them float32. The computation runs in float32 (float64 for a float64 `x`) and is rounded once. In
    training f receives float32, so for a low-precision `x` it stores twice the memory that f alone would.

    Args:
        activation: f, which becomes the child `activation`. Its lower-precision parameters are widened for the
            computation.
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
        """Applies the calibrated f to `x`, `(..., num_channels)`, floating point; the result has its shape and dtype.

        Raises:
            InputError: `x` is not a floating-point tensor, or has the wrong number of channels.
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
        if narrow:  # torch's PReLU, for example, accepts only its own dtype
            return torch.func.functional_call(self.activation, narrow, (t,))
        return self.activation(t)

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}"
