"""A short training of one MLP, weights and ε, toward the original MLP's output: no labels, no other layer."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from crrelu_llm.patching.calibration.anatomy import Weights

STEPS = 200
_TOKENS = 1024  # in a step
_RATE = 0.005  # learning rate of a weight matrix, as a share of the size of its entries
_EPSILON_RATE = 0.005
_WARM_UP = 20  # steps
_CHECKS = 12  # how often the held-back tokens are looked at
_PATIENCE = 4  # checks without a better one


def reconstruct(
    weights: Weights,
    activation: nn.Module,
    x: Tensor,
    target: Tensor,
    error: Callable[[Weights, nn.Module], float],
    seed: int,
) -> tuple[Weights, nn.Module]:
    """Minimises the mean squared difference between the MLP's output and `target` with Adam.

    Args:
        weights: Where the weights start.
        activation: The new activation; it is left as it is.
        x: The MLP's inputs, `(tokens, hidden)`, float32.
        target: The original MLP's outputs, `(tokens, hidden)`, float32.
        error: The error on tokens that are held back; the best weights by it are returned.
        seed: Decides which tokens a step sees; the same on every device.

    Returns:
        The best weights and activation found: those given, where training made nothing better.
    """
    activation = copy.deepcopy(activation)
    tensors = {name: value.clone().requires_grad_() for name, value in weights.tensors().items()}
    trained = replace(weights, **tensors)
    groups = [{"params": [value], "lr": _rate(name, tensors)} for name, value in tensors.items()]
    groups += [{"params": [parameter], "lr": _EPSILON_RATE} for parameter in activation.parameters()]
    # Not Adam's usual 0.999: there are only a few hundred steps.
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step))
    generator = torch.Generator().manual_seed(seed)
    unit = target.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    best = (error(weights, activation), weights, copy.deepcopy(activation))
    worse = 0
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(x), (_TOKENS,), generator=generator).to(x.device)
        with torch.enable_grad():
            loss = (trained.output(x[chosen], activation) - target[chosen]).square().mean() / unit
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, STEPS // _CHECKS) == 0 or step == STEPS:
            found = error(trained, activation)
            if found < best[0]:
                kept = {name: value.detach().clone() for name, value in tensors.items()}
                best, worse = (found, replace(weights, **kept), copy.deepcopy(activation)), 0
            else:
                worse += 1
                if worse == _PATIENCE:
                    break
    return best[1], best[2]


def _rate(name: str, tensors: dict[str, Tensor]) -> float:
    """A bias, which may be 0, moves like its matrix. The median: folding leaves a few rows that are far larger."""
    return _RATE * 1.48 * float(tensors[name.removesuffix("_bias")].detach().abs().median())


def _schedule(step: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
