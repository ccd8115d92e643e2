"""Errors of every function against float64, on the same rounded inputs."""

from typing import Any

import torch
from torch import Tensor

from crrelu_llm.bench.functions import Function
from crrelu_llm.bench.inputs import constants_of, inputs_of, make_tensors

_SHAPE = (256, 256)


def errors(found: list[Function], dtype: str, epsilon_per: str, device: torch.device) -> list[dict[str, Any]]:
    """The absolute errors of value and gradients, on 65 536 normal numbers with standard deviation 2.

    Args:
        found: The functions; a function that fails is skipped.
        dtype: Name of the torch dtype of the computation.
        epsilon_per: `"layer"` or `"channel"`.
        device: The device of the computation.

    Returns:
        `{name, backend, kind, dtype, value_max, value_mean, gradient_max, gradient_mean, epsilon_gradient}` each. The
        gradients are those of all inputs except ε. `epsilon_gradient` is the largest error of ε's gradient, a sum,
        divided by the norm of the float64 gradient; None for a function without ε.
    """
    tensors = make_tensors(_SHAPE, getattr(torch, dtype), epsilon_per, device)
    rows = []
    for function in found:
        exact = _evaluate(function, tensors, exact=True)
        try:
            given = _evaluate(function, tensors)
            if function.failed(device, getattr(torch, dtype), tensors["x"].numel()):
                continue
        except Exception:  # already reported by the timing
            if function.backend == "torch":
                raise
            continue
        about = {"name": function.name, "backend": function.backend, "kind": function.kind, "dtype": dtype}
        rows.append(about | _compare(function, given, exact))
    return rows


def _evaluate(function: Function, tensors: dict[str, Tensor], exact: bool = False) -> list[Tensor]:
    """Value and gradients, in float64."""
    inputs, grad, compute = inputs_of(function, tensors), tensors["grad"], function.compute
    constants = constants_of(function, tensors)
    if exact:
        inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        constants = [tensor.double() for tensor in constants]
        grad, compute = grad.double(), function.exact
    function.prepare()
    value = compute(*inputs, *constants)
    return [tensor.detach().double() for tensor in (value, *torch.autograd.grad(value, inputs, grad))]


def _compare(function: Function, given: list[Tensor], exact: list[Tensor]) -> dict[str, float | None]:
    pairs = list(zip(given, exact, strict=True))
    last = pairs.pop() if function.inputs[-1] in ("epsilon", "epsilons") else None
    differences = [(left - right).abs() for left, right in pairs]
    gradients = torch.cat([difference.flatten() for difference in differences[1:]])
    return {
        "value_max": differences[0].max().item(),
        "value_mean": differences[0].mean().item(),
        "gradient_max": gradients.max().item(),
        "gradient_mean": gradients.mean().item(),
        "epsilon_gradient": None if last is None else ((last[0] - last[1]).abs().max() / last[1].norm()).item(),
    }
