"""What calibration does to one site: fits its ε, or changes its whole MLP, and never makes held-back tokens worse."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.anatomy import Mlp, Weights
from crrelu_llm.patching.calibration.epsilon import EpsilonSums
from crrelu_llm.patching.calibration.reconstruct import reconstruct
from crrelu_llm.patching.calibration.refit import constant_direction, fold, relative_error, ridge
from crrelu_llm.patching.calibration.shape import Histogram, fit_shape
from crrelu_llm.patching.sites import Site

if TYPE_CHECKING:
    from crrelu_llm.patching.swap import PatchConfig

_SHAPE_TOKENS = 8192  # enough to see where a channel's inputs lie
_HELD_BACK = 4096  # enough to judge an error by
_UNSEEN = "no calibration token came here (an expert that was never chosen)"


@dataclass
class Calibrated:
    """What calibration did to one site.

    Attributes:
        kept: The level that the site ended with: the one asked for, or the best below it.
        relative_error: Root mean square of (new − original) over that of the original, on tokens that were held back,
            at the MLP's output; where no weights may be changed, on all tokens and at the MLP's product.
        relative_error_naive: The same right after a plain swap.
        scale_mean: Mean of the scale that was folded into the weights.
        note: Why less was kept than was asked for.
        changed_weights: Whether the MLP's weights are no longer the checkpoint's.
    """

    kept: str
    relative_error: float
    relative_error_naive: float
    scale_mean: float = 1.0
    note: str | None = None
    changed_weights: bool = False


class FitTask:
    """Fits ε of one site; its MLP's weights stay."""

    def __init__(self, site: Site, original: nn.Module, activation: nn.Module, note: str | None = None):
        self.site, self.original, self.activation, self.note = site, original, activation, note
        self.sums = EpsilonSums(activation, site.num_channels)

    def hooks(self) -> list[Any]:
        """Hooks to remove afterwards."""
        return []

    def seen(self, x: Tensor, y: Tensor, other: Tensor | None) -> None:
        """Counts a use of the original activation."""
        self.sums.add(x, y, other)

    def solve(self, config: PatchConfig, seed: int) -> Calibrated:
        """Sets ε of the new activation."""
        if not self.sums.finite:
            raise _not_finite(self.site)
        if not self.sums.total:
            return Calibrated("none", 0.0, 0.0, note=_UNSEEN)
        fit = self.sums.solve(config.epsilon_per)
        if fit.epsilon is None or fit.error >= fit.naive_error:
            return Calibrated("none", fit.naive_error, fit.naive_error, note=self.note)
        set_epsilon(self.activation, fit.epsilon)
        return Calibrated("fit", fit.error, fit.naive_error, note=self.note)


class MlpTask:
    """Fits ε, scale and following projection of one MLP, and trains it where that is asked for."""

    def __init__(self, site: Site, original: nn.Module, activation: nn.Module, mlp: Mlp):
        self.site, self.original, self.activation, self.mlp = site, original, activation, mlp
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def hooks(self) -> list[Any]:
        """Hooks that keep the MLP's inputs and outputs; to remove afterwards."""

        def keep_input(module: nn.Module, args: Any) -> None:
            self.inputs.append(_kept(args[0]))

        def keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
            self.outputs.append(_kept(output))

        return [
            self.mlp.gate.linear.register_forward_pre_hook(keep_input),
            self.mlp.down.register_forward_hook(keep_output),
        ]

    def seen(self, x: Tensor, y: Tensor, other: Tensor | None) -> None:
        """Nothing: the MLP's own inputs say more."""

    @torch.no_grad()
    def solve(self, config: PatchConfig, seed: int) -> Calibrated:
        """Sets the new activation's parameters and writes the MLP's new weights."""
        if not self.inputs:
            return Calibrated("none", 0.0, 0.0, note=_UNSEEN)
        x, target = torch.cat(self.inputs), torch.cat(self.outputs)
        if not (x.isfinite().all() and target.isfinite().all()):
            raise _not_finite(self.site)
        held = _held_back(len(x)).to(x.device)
        x, target, x_held, target_held = x[~held], target[~held], x[held][:_HELD_BACK], target[held][:_HELD_BACK]
        self.activation.to(x.device)
        weights = self.mlp.read()

        def error(weights: Weights, activation: nn.Module) -> float:
            return relative_error(weights, activation, x_held, target_held)

        naive = _Candidate("none", weights, self.activation, error(weights, self.activation))
        starts = self._shapes(weights, x, config)
        for start in starts:
            start.error = error(start.weights, start.activation)
        best = min(naive, *starts, key=_error)
        for changed in ridge(best.weights, best.activation, x, target):
            found = replace(best, kept="refit", weights=changed, error=error(changed, best.activation))
            best = min(best, found, key=_error)
        if config.calibration == "reconstruct":
            changed, activation = reconstruct(best.weights, best.activation, x, target, error, seed)
            found = _Candidate("reconstruct", changed, activation, error(changed, activation), best.scale)
            best = min(best, found, key=_error)
        self.activation = best.activation
        if best.weights is not weights:
            self.mlp.write(best.weights)
        note = None
        if best.kept != config.calibration and naive.error > 0:
            note = f"{config.calibration} was no better on held-back tokens"
        return Calibrated(best.kept, best.error, naive.error, best.scale, note, best.weights is not weights)

    def _shapes(self, weights: Weights, x: Tensor, config: PatchConfig) -> list[_Candidate]:
        """ε alone, and ε with factors folded into the weights: without a shift, and with one."""
        few = x[:_SHAPE_TOKENS]
        z = nn.functional.linear(few, weights.gate, weights.gate_bias)
        up = None if weights.up is None else nn.functional.linear(few, weights.up, weights.up_bias)
        sums = EpsilonSums(self.activation, self.site.num_channels)
        sums.add(z, self.original(z), up)
        found = [_Candidate("fit", weights, self._with(sums.solve(config.epsilon_per).epsilon))]
        histogram = Histogram(z, up)
        one = constant_direction(x) if weights.gate_bias is None else None
        for blur in (None, self._blur(few, up, one)):
            shape = fit_shape(
                self.original,
                self.activation,
                histogram,
                config.epsilon_per,
                weights.down.square().sum(0),
                blur,
                constant=weights.up is None and weights.down_bias is not None,
            )
            folded = fold(weights, shape, one)
            scale = float(shape.scale.abs().mean())
            found.append(_Candidate("refit", folded, self._with(shape.epsilon), scale=scale))
        return found

    def _blur(self, x: Tensor, up: Tensor | None, one: Tensor | None) -> Tensor:
        """How far a shift along `one` is off, as a share of it: root mean square for each channel."""
        if one is None:
            return x.new_zeros(self.site.num_channels)
        off = (x @ one - 1).square()
        weight = x.new_ones(len(x), self.site.num_channels) if up is None else up.square()
        return ((off @ weight) / weight.sum(0).clamp_min(1e-20)).sqrt()

    def _with(self, epsilon: Tensor | None) -> nn.Module:
        activation = copy.deepcopy(self.activation)
        if epsilon is not None:
            set_epsilon(activation, epsilon)
        return activation


@dataclass
class _Candidate:
    """A way to set one MLP, and its error on held-back tokens."""

    kept: str
    weights: Weights
    activation: nn.Module
    error: float = 0.0
    scale: float = 1.0


def _error(candidate: _Candidate) -> float:
    return candidate.error


def set_epsilon(activation: nn.Module, epsilon: Tensor) -> None:
    """Sets ε of a CRReLU."""
    assert isinstance(activation, CRReLU)
    with torch.no_grad():
        activation.epsilon.copy_(epsilon)


def _kept(tensor: Tensor) -> Tensor:
    """A float32 copy, `(tokens, features)`: what follows may change the tensor in place."""
    return tensor.reshape(-1, tensor.shape[-1]).to(torch.float32, copy=True)


def _held_back(tokens: int) -> Tensor:
    """Which tokens are for judging: whole stretches of text, one in eight, at least one token."""
    stretch = max(1, min(512, tokens // 16))
    held = torch.arange(tokens) // stretch % 8 == 7
    if not held.any():
        held[-1] = True
    return held


def _not_finite(site: Site) -> InputError:
    return InputError(
        f"{site.path}: its inputs or outputs on the calibration text are not finite: the checkpoint is broken there, "
        "or needs a wider dtype"
    )
