"""Dynamic EAFO: tracks the density of pre-activations in training, and moves CRReLU's centre and width with it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.training.optimizer import epsilon_modules

logger = logging.getLogger("crrelu_llm")
MIN_WIDTH = 1e-3  # a narrower bump would lie between neighbouring bfloat16 numbers


class MomentTracker:
    """Sums over the pre-activations of every fitted site in training: their number, Σx and Σx².

    Forward pre-hooks count the forward passes in training mode with gradients, and so neither evaluation nor a
    reference under `no_grad`. Gradient checkpointing repeats forward passes: with `use_reentrant` only the repeated
    pass is counted, otherwise every site counts both, which does not change the mean. Tokens that a two-dimensional
    attention mask excludes are left out, except where a model flattens batch and tokens before the site (OPT,
    experts).

    Sums are float64 on CPUs. On other devices one forward pass is summed in float32, and the passes in float64.

    Args:
        model: The trainer's model; under PEFT the trained copies are observed.
    """

    def __init__(self, model: nn.Module):
        found = epsilon_modules(model)
        self.modules = {path: module for path, module in found.items() if isinstance(module, FittedCRReLU)}
        self._sums: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        trained: Any = model
        base = trained.get_base_model() if hasattr(model, "get_base_model") else trained
        # Hooked on the decoder, because some losses call only the decoder. All its options are passed by keyword.
        decoder: nn.Module = base.base_model
        self._handles: list[RemovableHandle] = [
            decoder.register_forward_pre_hook(self._keep_mask, with_kwargs=True),
            *(module.register_forward_pre_hook(self._adder(path)) for path, module in self.modules.items()),
        ]

    def take(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the sums since the last call, `(sites, 3)`, float64: count, Σx, Σx²; then resets them to 0."""
        nothing = torch.zeros(3, dtype=torch.float64)
        sums = torch.stack([self._sums.get(path, nothing).to(device) for path in self.modules])
        self._sums.clear()
        return sums

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mask = None

    def _keep_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _adder(self, path: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training and torch.is_grad_enabled():
                found = _sums(args[0].detach(), self._mask)
                before = self._sums.get(path)
                self._sums[path] = found if before is None else before + found

        return add


@torch.no_grad()
def _sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """Count, Σx and Σx², `(3,)`, float64, of the entries of `x`, `(batch, tokens, channels)`, that `mask` keeps."""
    wide = torch.float64 if x.device.type == "cpu" else torch.float32
    count = torch.full((), float(x.numel()), dtype=wide, device=x.device)
    if mask is not None and mask.shape == x.shape[:-1]:
        keep = mask.to(x.device) != 0
        x = torch.where(keep[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        count = keep.sum().to(wide) * x.shape[-1]
    # A norm avoids a second tensor of the size of x.
    square = torch.linalg.vector_norm(x, dtype=wide).double().square()
    return torch.stack([count.double(), x.sum(dtype=wide).double(), square])


class DensityCallback(TrainerCallback, ExportableState):
    """Moves the centre and width of every fitted CRReLU to the running moments of its pre-activations.

    After every optimiser step the running moments of each site are updated: m ← momentum·m + (1 − momentum)·batch.
    `batch` is the first two raw moments over all tokens of the step (every micro-batch, every process) and all
    channels; the start values come from the model's own centre and width. After every `steps` steps, centre and width
    are set to the running mean and standard deviation, before anything is logged or saved.

    `trainer_state.json` stores the running moments, so that a resumed run equals an uninterrupted one exactly.

    Args:
        steps: Optimiser steps between two updates.
        momentum: Share of the running moments that a step keeps, in [0, 1).
    """

    def __init__(self, steps: int, momentum: float):
        self.steps, self.momentum = steps, momentum
        self.moments: dict[str, list[float]] = {}
        self._tracker: MomentTracker | None = None
        self._warned = False

    def state(self) -> dict[str, Any]:
        """The state in a checkpoint: mean and mean square of every site."""
        arguments = {"steps": self.steps, "momentum": self.momentum}
        return {"args": arguments, "attributes": {"moments": {path: [*pair] for path, pair in self.moments.items()}}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Starts tracking from the moments of the resumed checkpoint, or else from the model's own."""
        if self._tracker is not None:  # a second start, with a batch size that fits in memory
            self._tracker.remove()
        self._tracker = MomentTracker(model)
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        known = saved.get("attributes", {}).get("moments", {})
        self.moments = {
            path: [*known[path]] if path in known else _moments_of(module)
            for path, module in self._tracker.modules.items()
        }
        state.stateful_callbacks[type(self).__name__] = self.state()  # the trainer saves only the state found there

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the finished step; every `steps` steps, sets centre and width."""
        assert self._tracker is not None
        if not self._tracker.modules:
            return
        sums = self._tracker.take(args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(sums)
        for (path, running), (count, first, second) in zip(self.moments.items(), sums.tolist(), strict=True):
            if count == 0:  # no token reached the site
                continue
            if not abs(first) + second < float("inf"):
                self._warn(path, state.global_step)
                continue
            for index, total in enumerate((first, second)):
                running[index] = self.momentum * running[index] + (1 - self.momentum) * (total / count)
        if state.global_step % self.steps == 0:
            for path, module in self._tracker.modules.items():
                _set_density(module, *self.moments[path])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes the hooks."""
        if self._tracker is not None:
            self._tracker.remove()
            self._tracker = None

    def _warn(self, path: str, step: int) -> None:
        if not self._warned:
            logger.warning(
                "%s: pre-activations at step %d are not finite; centre and width skip such steps (logged once)",
                path,
                step,
            )
        self._warned = True


def density_means(model: nn.Module) -> tuple[float, float] | None:
    """The means of the centre and of the width over the fitted sites; None if there is no fitted site."""
    pairs = [(m.center, m.width) for m in epsilon_modules(model).values() if isinstance(m, FittedCRReLU)]
    if not pairs:
        return None
    center, width = (torch.cat([part.detach().float().cpu() for part in parts]) for parts in zip(*pairs, strict=True))
    return center.mean().item(), width.mean().item()


def _moments_of(module: FittedCRReLU) -> list[float]:
    """Mean and mean square of a module's density."""
    center, width = module.center.item(), module.width.item()
    return [center, width * width + center * center]


@torch.no_grad()
def _set_density(module: FittedCRReLU, first: float, second: float) -> None:
    module.center.fill_(first)
    module.width.fill_(max(max(second - first * first, 0.0) ** 0.5, MIN_WIDTH))
