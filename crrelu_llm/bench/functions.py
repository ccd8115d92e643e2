"""The activations and gated products that `bench op` compares: CRReLU's backends, torch's own, Liger's."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crrelu_llm import kernels
from crrelu_llm.kernels import choice, formula


@dataclass(frozen=True)
class Function:
    """One implementation of one function.

    Attributes:
        name: The name of the function.
        backend: The implementation.
        kind: `activation` or `gated`.
        inputs: Names of its arguments: `x`, `gate`, `up`, `gate_up`, `epsilon`; `epsilons`, one ε per channel.
        constants: Names of further arguments without a gradient: `affine`.
        compute: Computes the function, after `prepare`.
        exact: Computes the same function in float64.
        forced: The CRReLU backend that must be set while the function runs.
        overwrites: Whether the backward pass overwrites the inputs, so that it needs copies.
    """

    name: str
    backend: str
    kind: str
    inputs: tuple[str, ...]
    compute: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    forced: str | None = None
    overwrites: bool = False
    constants: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Sets the backend; also needed before the backward pass, which reads it too."""
        if self.forced is not None and choice.forced() != self.forced:  # setting it clears the recorded failures
            choice.set_backend(self.forced)

    def failed(self, device: torch.device, dtype: torch.dtype, elements: int) -> str | None:
        """Why another backend has taken over; None if none has."""
        self.prepare()
        name, reason = choice.choose(device, dtype, elements)
        return None if self.forced in (None, name) else reason


# Name, kind, arguments, the implementation, the same in float64.
_CRRELU: tuple[tuple[str, str, tuple[str, ...], Any, Any], ...] = (
    ("crrelu", "activation", ("x", "epsilon"), kernels.crrelu, formula.crrelu),
    ("crrelu_gated", "gated", ("gate", "up", "epsilon"), kernels.crrelu_gated, formula.crrelu_gated),
    ("crrelu_packed", "gated", ("gate_up", "epsilon"), kernels.crrelu_packed, formula.crrelu_packed),
)
# The calibrated forms, with one ε per channel and the four.
_CALIBRATED = tuple(
    (f"{name}_calibrated", kind, (*inputs[:-1], "epsilons"), compute, exact)
    for name, kind, inputs, compute, exact in _CRRELU
)


def functions(device: torch.device) -> tuple[list[Function], list[dict[str, str]]]:
    """All functions that can run on a device, and those that cannot, `{name, backend, reason}` each."""
    found, left_out = list(_torch_functions()), []
    for backend in choice.BACKENDS:
        with choice.using(backend):
            name, reason = choice.choose(device, torch.float32, 1)
        interpreted = backend == "triton" and device.type == "cpu"
        if name != backend or interpreted:
            reason = "its interpreter is not for timing" if name == backend else reason
            reason = reason.removeprefix(f"{backend} was chosen, but ")
            left_out.append({"name": "crrelu", "backend": backend, "reason": reason})
            continue
        found += [
            Function(name, backend, kind, inputs, compute, exact, forced=backend)
            for name, kind, inputs, compute, exact in _CRRELU
        ]
        if backend not in ("reference", "eager"):  # one form of these two is enough to show their cost
            found += [
                Function(name, backend, kind, inputs, compute, exact, forced=backend, constants=("affine",))
                for name, kind, inputs, compute, exact in _CALIBRATED
            ]
    found += [
        Function(name, "torch.compile", kind, inputs, _compiled(exact), exact)
        for name, kind, inputs, _, exact in _CRRELU[:2]
    ]
    try:
        found += _liger_functions(device)
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        left_out.append({"name": "geglu and swiglu", "backend": "liger", "reason": reason})
    return found, left_out


def _torch_functions() -> list[Function]:
    tanh = functools.partial(F.gelu, approximate="tanh")
    plain: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "gelu_tanh": tanh, "silu": F.silu, "relu": F.relu}
    gated: dict[str, Callable[..., Tensor]] = {"geglu": _geglu, "swiglu": _swiglu}
    return [
        *(Function(name, "torch", "activation", ("x",), compute, compute) for name, compute in plain.items()),
        *(Function(name, "torch", "gated", ("gate", "up"), compute, compute) for name, compute in gated.items()),
    ]


def _liger_functions(device: torch.device) -> list[Function]:
    """Liger's GEGLU (with tanh) and SwiGLU, whose backward passes overwrite gate and up with the gradients."""
    if device.type != "cuda":
        raise RuntimeError(f"no GPU ({device.type})")
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return [
        Function(name, "liger", "gated", ("gate", "up"), compute, exact, overwrites=True)
        for name, compute, exact in (
            ("geglu", LigerGELUMulFunction.apply, _geglu_tanh),
            ("swiglu", LigerSiLUMulFunction.apply, _swiglu),
        )
    ]


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def _geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles once for all sizes; with `fullgraph`, too many recompilations raise instead of running uncompiled."""
    return torch.compile(function, fullgraph=True, dynamic=True)
