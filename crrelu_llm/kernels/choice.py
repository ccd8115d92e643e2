"""Chooses the backend by device, dtype and size, unless the user does; drops a backend that fails, with a warning."""

import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from crrelu_llm.errors import InputError

BACKENDS = ("reference", "eager", "inductor", "triton")
VARIABLE = "CRRELU_BACKEND"
# The number of elements from which a compiled loop is worth its start-up: 6 s per process, twice that with an empty
# torch cache on disk. A gated float32 product without gradients, on one busy core of an EPYC, eager vs compiled: 3·2¹⁶
# elements 0.8 vs 0.8 ms; 3·2¹⁷ 2.6 vs 1.3 ms; 3·2¹⁸ (512 tokens in an MLP of width 1536) 8.0 vs 1.9 ms.
COMPILED_FROM = 1 << 18

logger = logging.getLogger("crrelu_llm")
_failed: dict[str, str] = {}
_forced: str | None = None


def set_backend(name: str | None = None) -> None:
    """Chooses the backend of every CRReLU in this process.

    Args:
        name: `"reference"` (the literal formula, in the dtype of the input), `"eager"`, `"inductor"` (CPUs),
            `"triton"` (GPUs) or `"auto"`: the best one for each call. It overrides the environment variable
            CRRELU_BACKEND, which takes the same names; None removes the override.

    Raises:
        InputError: The name is unknown.
    """
    global _forced
    _checked(name, "set_backend")
    _forced = name
    _failed.clear()


def forced() -> str | None:
    """The backend chosen by the user; None if each call takes the best one.

    Raises:
        InputError: The environment variable holds an unknown name.
    """
    found = override()
    return found[0] if found else None


def override() -> tuple[str, str] | None:
    """The backend chosen by the user, and where: in `set_backend` or in the environment variable.

    Raises:
        InputError: The environment variable holds an unknown name.
    """
    name = _checked(_forced or os.environ.get(VARIABLE), VARIABLE)
    return None if name is None else (name, "set_backend" if _forced else VARIABLE)


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """A context with `set_backend(name)`, which then restores the previous setting."""
    global _forced
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = before


def _checked(name: str | None, where: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise InputError(
            f"{where}: unknown backend {name!r}; choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
        )
    return name


def choose(device: torch.device, dtype: torch.dtype, elements: int) -> tuple[str, str]:
    """The backend for one call, and the reason in words.

    Args:
        device: The device of the input.
        dtype: The dtype of the input.
        elements: The number of its elements.
    """
    name = forced()
    if name is not None:
        reason = _unavailable(name, device)
        return (name, "chosen by the user") if reason is None else ("eager", f"{name} was chosen, but {reason}")
    best = "inductor" if device.type == "cpu" else "triton"
    if best == "inductor" and elements < COMPILED_FROM:
        return "eager", f"below {COMPILED_FROM} elements, compiling does not pay"
    if best == "inductor" and dtype == torch.float64:
        return "eager", "float64 is for checks"
    reason = _unavailable(best, device)
    return (best, "the fastest on this device") if reason is None else ("eager", f"{best}: {reason}")


def _unavailable(name: str, device: torch.device) -> str | None:
    if name in _failed:
        return f"it failed: {_failed[name]}"
    return None if name in ("reference", "eager") else _module_unavailable(name, device)


@functools.cache
def _module_unavailable(name: str, device: torch.device) -> str | None:
    try:
        return _module(name).unavailable(device)
    except ImportError as error:
        return f"{' '.join(str(error).split())}"


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"crrelu_llm.kernels.{name}")


@functools.cache
def _warn(message: str) -> None:
    logger.warning("crrelu: %s", message)


def run(function: str, x: torch.Tensor, *args: Any) -> Any:
    """Calls a backend's function, `forward`, `backward`, `gated_forward` or `gated_backward`: see `eager`."""
    name, reason = choose(x.device, x.dtype, x.numel())
    eager = getattr(_module("eager"), function)
    if name not in ("inductor", "triton"):
        if "was chosen, but" in reason and not _failed:  # a failure was already logged
            _warn(f"{reason}; eager is used")
        return eager(x, *args)
    try:
        return getattr(_module(name), function)(x, *args)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        result = eager(x, *args)  # if this fails too, the input is wrong, not the backend
        _failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning("crrelu: the %s backend failed, from now on eager is used (%s)", name, _failed[name])
        return result
