"""What calibration does to one site: fits its ε, or changes its whole MLP, and never makes held-back tokens worse."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.anatomy import Mlp, Weights
from crrelu_llm.patching.calibration.epsilon import EpsilonFit, EpsilonSums
from crrelu_llm.patching.calibration.reconstruct import reconstruct
from crrelu_llm.patching.calibration.refit import constant_direction, fold, relative_error, ridge
from crrelu_llm.patching.calibration.shape import Histogram, fit_shape
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.sites import Site

_SHAPE_TOKENS = 8192  # enough to see where a channel's inputs lie
_HELD_BACK = 4096  # enough to judge an error by
_FEWEST_TOKENS = 128  # that weights are fitted to
_UNSEEN = "no calibration token came here"
_MORE_THAN_WEIGHTS = "this MLP computes more than its weights say (a clamp, for example)"


@dataclass
class Calibrated:
    """What calibration did to one site.

    Attributes:
        kept: The level that the site ended with: the one asked for, or the best below it.
        relative_error: Root mean square of (new − original) over that of the original, on tokens that were held back
            (but chose among the candidates), at the MLP's output; where only ε was fitted, on the tokens that it was
            fitted to, at the MLP's product.
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
            raise not_finite(self.site)
        if not self.sums.total:
            return Calibrated("none", 0.0, 0.0, note=_UNSEEN)
        fit = self.sums.solve(config.epsilon_per)
        if config.calibration == "none" or fit.epsilon is None or fit.error >= fit.naive_error:
            return Calibrated("none", fit.naive_error, fit.naive_error, note=self.note)
        set_epsilon(self.activation, fit.epsilon)
        return Calibrated("fit", fit.error, fit.naive_error, note=self.note)


class MlpTask:
    """Fits ε, scale and following projection of one MLP, and trains it where that is asked for."""

    def __init__(self, site: Site, original: nn.Module, activation: nn.Module, mlp: Mlp):
        self.site, self.original, self.activation, self.mlp = site, original, activation, mlp
        self.before: Weights
        self.after: Weights
        self.only_epsilon: tuple[EpsilonFit, nn.Module]
        self.agrees = True
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
        self.inputs, self.outputs = [], []
        if not (x.isfinite().all() and target.isfinite().all()):
            raise not_finite(self.site)
        self.activation.to(x.device)
        self.before = weights = self.mlp.read()
        self.only_epsilon = self._only_epsilon(weights, _some(x, _SHAPE_TOKENS), config)
        if len(x) < _FEWEST_TOKENS:
            return self._fitted(f"{config.calibration} needs {_FEWEST_TOKENS} tokens here, there were {len(x)}")
        held = _held_back(len(x)).to(x.device)
        x_held, target_held = _some(x[held], _HELD_BACK), _some(target[held], _HELD_BACK)
        x, target = x[~held], target[~held]

        def error(weights: Weights, activation: nn.Module) -> float:
            found = relative_error(self.mlp.rounded(weights), activation, x_held, target_held)
            return found if math.isfinite(found) else math.inf

        naive = _Candidate("none", weights, self.activation, error(weights, self.activation))
        best = naive
        for start in self._shapes(weights, x, config):
            start.error = error(start.weights, start.activation)
            best = min(best, start, key=_error)
        for changed in ridge(best.weights, best.activation, x, target):
            found = replace(best, kept="refit", weights=changed, error=error(changed, best.activation))
            best = min(best, found, key=_error)
        if config.calibration == "reconstruct":
            changed, activation = reconstruct(best.weights, best.activation, x, target, error, seed)
            found = _Candidate("reconstruct", changed, activation, error(changed, activation), best.scale)
            best = min(best, found, key=_error)
        self.activation, self.after = best.activation, best.weights
        if best.weights is not weights:
            self.mlp.write(best.weights)
        note = None
        if best.kept != config.calibration and naive.error > 0:
            note = f"{config.calibration} was no better on held-back tokens"
        return Calibrated(best.kept, best.error, naive.error, best.scale, note, best.weights is not weights)

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Compares what the MLP gives while the model runs with what its weights say; the result is `agrees`."""
        given: list[Tensor] = []
        self.agrees = True

        def compare(module: nn.Module, args: Any, output: Tensor) -> None:
            expected = self.after.output(given.pop(), self.activation)
            off = (_kept(output) - expected).norm() / expected.norm().clamp_min(1e-30)
            self.agrees &= bool(off < (1e-3 if output.dtype == torch.float32 else 0.1))

        hooks = [
            self.mlp.gate.linear.register_forward_pre_hook(lambda module, args: given.append(_kept(args[0]))),
            self.mlp.down.register_forward_hook(compare),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def give_up(self, config: PatchConfig) -> Calibrated:
        """Puts the MLP's own weights back and only fits ε."""
        self.mlp.write(self.before)
        return self._fitted(_MORE_THAN_WEIGHTS)

    def _fitted(self, note: str) -> Calibrated:
        fit, self.activation = self.only_epsilon
        kept = "none" if fit.epsilon is None or fit.error >= fit.naive_error else "fit"
        return Calibrated(
            kept, min(fit.error, fit.naive_error), fit.naive_error, note=f"only epsilon was fitted: {note}"
        )

    def _only_epsilon(self, weights: Weights, x: Tensor, config: PatchConfig) -> tuple[EpsilonFit, nn.Module]:
        z, up = _fed(weights, x)
        sums = EpsilonSums(self.activation, self.site.num_channels)
        sums.add(z, self.original(z), up)
        fit = sums.solve(config.epsilon_per)
        better = fit.error < fit.naive_error
        return fit, self._with(fit.epsilon) if better else self.activation

    def _shapes(self, weights: Weights, x: Tensor, config: PatchConfig) -> Iterator[_Candidate]:
        """ε alone, and ε with factors folded into the weights: without a shift, and with one."""
        yield _Candidate("fit", weights, self.only_epsilon[1])
        few = _some(x, _SHAPE_TOKENS)
        z, up = _fed(weights, few)
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
            scale = float(shape.scale.abs().mean())
            yield _Candidate("refit", fold(weights, shape, one), self._with(shape.epsilon), scale=scale)

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


def _fed(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the activation is fed with, and what its output is multiplied by."""
    z = nn.functional.linear(x, weights.gate, weights.gate_bias)
    return z, None if weights.up is None else nn.functional.linear(x, weights.up, weights.up_bias)


def _some(rows: Tensor, number: int) -> Tensor:
    """At most so many rows, from all over the text."""
    return rows[:: max(1, len(rows) // number)][:number]


def _held_back(tokens: int) -> Tensor:
    """Which tokens are for judging: whole stretches of text, one in eight, at least one token."""
    stretch = max(1, min(512, tokens // 16))
    held = torch.arange(tokens) // stretch % 8 == 7
    if not held.any():
        held[-1] = True
    return held


def not_finite(site: Site) -> InputError:
    """The error of a site where a number is infinite or NaN."""
    return InputError(
        f"{site.path}: its inputs or outputs on the calibration text are not finite: the checkpoint is broken there, "
        "or needs a wider dtype"
    )
