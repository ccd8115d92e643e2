"""New weights for an MLP with a new activation, without a gradient step: folded factors and a ridge regression."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from crrelu_llm.patching.calibration.anatomy import Weights
from crrelu_llm.patching.calibration.shape import Shape

_CHUNK = 4096  # tokens at a time
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the features' mean square


def fold(weights: Weights, shape: Shape, one: Tensor | None) -> Weights:
    """Moves a shape's factors into the weights, so that `f(x)` becomes `gain·f(scale·(x + shift)) + constant`.

    Gated MLP: gate rows × scale, up rows × gain. Plain MLP: input rows and bias × scale, output columns × gain. A
    shift goes into the bias; without one, into the weights, along the direction in which the inputs are all alike.

    Args:
        weights: The MLP's weights.
        shape: What each channel's activation becomes.
        one: `(hidden,)`: its product with an input is about 1; needed for a shift where there is no bias.
    """
    scale, gain, shift, constant = (
        part.to(weights.gate) for part in (shape.scale, shape.gain, shape.shift, shape.constant)
    )
    changed = replace(weights)
    if weights.gate_bias is not None:
        changed.gate_bias = (weights.gate_bias + shift) * scale
        changed.gate = weights.gate * scale[:, None]
    else:
        moved = weights.gate if one is None else weights.gate + shift[:, None] * one
        changed.gate = moved * scale[:, None]
    if weights.up is not None:
        changed.up = weights.up * gain[:, None]
        if weights.up_bias is not None:
            changed.up_bias = weights.up_bias * gain
    else:
        changed.down = weights.down * gain
        if weights.down_bias is not None:
            changed.down_bias = weights.down_bias + weights.down @ constant
    return changed


def constant_direction(x: Tensor) -> Tensor:
    """The vector `one`, `(hidden,)`, whose product with each row of `x`, `(tokens, hidden)`, is as near 1 as can be.

    The inputs of an MLP come out of a norm and have a large common part, so that this serves as a bias.
    """
    second = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for given in x.split(_CHUNK):
        second += (given.T @ given).double()
    second /= len(x)
    second.diagonal().add_(1e-5 * second.diagonal().mean() + 1e-30)  # not 0 where all inputs are
    return torch.linalg.solve(second, x.double().mean(0)).float()


@torch.no_grad()
def ridge(weights: Weights, activation: nn.Module, x: Tensor, target: Tensor) -> list[Weights]:
    """Refits the following projection, and its bias, so that the MLP's output comes closest to `target`.

    Solves argmin ‖(W + ΔW)·h − target‖² + λ‖ΔW‖² (the bias is not penalised) for several λ: the change is drawn to 0,
    so that few tokens change little.

    Args:
        weights: The MLP's weights, as they enter.
        activation: Its new activation.
        x: The MLP's inputs, `(tokens, hidden)`, float32.
        target: What it should give, `(tokens, hidden)`, float32.

    Returns:
        One set of weights for each λ, the smallest λ first.
    """
    width, biased = weights.down.shape[1], weights.down_bias is not None
    size = width + biased
    gram = torch.zeros(size, size, dtype=torch.float64, device=x.device)
    moment = torch.zeros(size, target.shape[1], dtype=torch.float64, device=x.device)
    for given, wanted in zip(x.split(_CHUNK), target.split(_CHUNK), strict=True):
        features = weights.features(given, activation)
        residual = wanted - nn.functional.linear(features, weights.down, weights.down_bias)
        if biased:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        gram += (features.T @ features).double()
        moment += (features.T @ residual).double()
    diagonal = gram.diagonal().clone()
    unit = diagonal[:width].mean()
    found = []
    for penalty in _PENALTIES:
        gram.diagonal().copy_(diagonal)
        gram.diagonal()[:width] += penalty * unit
        gram.diagonal()[width:] += 1e-9 * unit
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed or not unit > 0:
            continue
        change = torch.cholesky_solve(moment, factor).T.float()
        refitted = replace(weights, down=weights.down + change[:, :width])
        if weights.down_bias is not None:
            refitted.down_bias = weights.down_bias + change[:, width]
        found.append(refitted)
    return found


@torch.no_grad()
def relative_error(weights: Weights, activation: nn.Module, x: Tensor, target: Tensor) -> float:
    """Root mean square of (output − target) over that of `target`."""
    left = total = 0.0
    for given, wanted in zip(x.split(_CHUNK), target.split(_CHUNK), strict=True):
        left += (weights.output(given, activation) - wanted).double().square().sum().item()
        total += wanted.double().square().sum().item()
    return (left / total) ** 0.5 if total > 0 else 0.0
