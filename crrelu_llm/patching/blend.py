"""The gradual swap: trains (1 − λ)·original + λ·new while λ goes from 0 to 1, without renaming a parameter."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.activations import build_activation

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: 0.5 * (1.0 - math.cos(math.pi * t)),
}
# What a blended activation computes: the mixture (in evaluation mode, the new activation), only the new activation, or
# only the original.
_MIX, _NEW, _ORIGINAL = "mix", "new", "original"


def blend_weight(step: int, steps: int, schedule: str = "linear") -> float:
    """λ of an optimiser step: 0 at step 0, exactly 1 from step `steps` on.

    Args:
        step: Optimiser steps done before this one.
        steps: Length of the blend; 0 means no blend.
        schedule: `"linear"`, or `"cosine"`: (1 − cos(π·step/steps)) / 2.
    """
    return 1.0 if step >= steps else SCHEDULES[schedule](step / steps)


class Blend:
    """The blend of every site of one patched model.

    The blend is a forward hook on the patched model's activations. Paths, parameter names and the state dict stay
    those of the plain patched model, so a checkpoint saved at any step is a pure patched checkpoint. Like dropout, the
    mixture applies in training mode only; in evaluation mode the model computes what would be saved.

    λ is a 0-dimensional float32 buffer beside each activation, left out of the state dict. λ is a tensor so that a
    compiled graph does not depend on its value.

    Args:
        activations: The activation modules of a patched model, each with the path of its site, the name of its
            original activation and the device of its λ.

    Raises:
        InputError: An original activation has parameters of its own, which a patched checkpoint does not hold.
    """

    def __init__(self, activations: list[tuple[nn.Module, str, str, torch.device]]):
        for module, path, name, device in activations:
            _install(module, path, name, device)
        self.modules: list[Any] = [module for module, *_ in activations]
        self.weight = 0.0
        self.set(0.0)

    def set(self, weight: float) -> None:
        """Sets λ, in place. Once λ is 1, the original is no longer computed."""
        self.weight = weight
        for module in self.modules:
            module.blend.fill_(weight)
        self._show(_NEW if weight >= 1 else _MIX)

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """A context in which the model computes the original activations, in training and in evaluation mode.

        λ does not change: a graph built before keeps its λ for the backward pass.
        """
        before = [module._blend_shows for module in self.modules]
        self._show(_ORIGINAL)
        try:
            yield
        finally:
            for module, mode in zip(self.modules, before, strict=True):
                module._blend_shows = mode

    def stay_original(self) -> None:
        """Makes the model compute the original activations permanently (for a reference model)."""
        self._show(_ORIGINAL)

    def _show(self, mode: str) -> None:
        for module in self.modules:
            module._blend_shows = mode


def _install(module: nn.Module, path: str, name: str, device: torch.device) -> None:
    if "_original" not in module.__dict__:  # a reloaded checkpoint knows the original by its name
        module.__dict__["_original"] = [build_activation(name)]
    original = module.__dict__["_original"][0]
    if any(True for _ in original.parameters()):
        raise InputError(
            f"blend_steps: the original activation of {path}, {name}, has parameters that a patched checkpoint does "
            "not hold; train without blend_steps"
        )
    module.register_buffer("blend", torch.zeros((), dtype=torch.float32, device=device), persistent=False)
    # A plain function that reads its state from the module, so that a deep copy of the module blends on its own.
    module.register_forward_hook(_blend)


def _blend(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    if module._blend_shows == _NEW or (module._blend_shows == _MIX and not module.training):
        return output
    original = module._original[0](args[0])
    if len(args) == 2:  # a gated product, in one call
        original = original * args[1]
    return original if module._blend_shows == _ORIGINAL else mix(original, output, module.blend)


def mix(original: torch.Tensor, new: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 − λ)·original + λ·new, computed in float32 (float64 for float64), in the dtype of `new`.

    At λ = 0 and λ = 1 the result is one of the two bit for bit, even where the other is infinite or NaN.

    Args:
        original: Floating point, any shape.
        new: The same shape and dtype.
        weight: λ, 0-dimensional; gets no gradient.
    """
    wide = torch.float64 if new.dtype == torch.float64 else torch.float32
    share = weight.to(wide)
    mixed = ((1 - share) * original.to(wide) + share * new.to(wide)).to(new.dtype)
    return torch.where(weight <= 0, original, torch.where(weight >= 1, new, mixed))
