"""The input tensors for the functions of `bench op`."""

import torch
from torch import Tensor

from crrelu_llm.bench.functions import Function


def make_tensors(
    shape: tuple[int, ...], dtype: torch.dtype, epsilon_per: str, device: torch.device
) -> dict[str, Tensor]:
    """The inputs, normal with standard deviation 2, which require gradients, and the gradient of the result, `grad`.

    `gate_up` is `(..., 2·channels)`; ε is 0.01 in float32, `(1,)` or `(channels,)`; `epsilons` is always
    `(channels,)`. `affine`, `(4, channels)`, is scale, shift, gain and offset, without a gradient.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(2).to(dtype)

    tensors = {name: draw(*shape) for name in ("x", "gate", "up")}
    tensors["gate_up"] = torch.cat((tensors["gate"], tensors["up"]), dim=-1)
    tensors["epsilon"] = torch.full((shape[-1] if epsilon_per == "channel" else 1,), 0.01, device=device)
    tensors["epsilons"] = torch.full((shape[-1],), 0.01, device=device)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    spread = torch.linspace(-1, 1, shape[-1], device=device)
    affine = torch.stack([1 + spread / 4, spread / 4, 1 - spread / 4, spread / 8])
    return tensors | {"affine": affine, "grad": draw(*shape)}


def inputs_of(function: Function, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The arguments of a function that require gradients; copies if the function overwrites them."""
    found = [tensors[name] for name in function.inputs]
    return [tensor.detach().clone().requires_grad_() for tensor in found] if function.overwrites else found


def constants_of(function: Function, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The further arguments, without gradients."""
    return [tensors[name] for name in function.constants]
