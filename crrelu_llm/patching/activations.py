"""Builds activation modules by name, resets them, and names the activations of a model."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from crrelu_llm.activation import AFFINE, AffineModule, Calibrated, CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU

# The class in which PEFT wraps an activation that it saves with an adapter.
PEFT_WRAPPER = "ModulesToSaveWrapper"
# Activations of torch that transformers has no name for; the hook registers these names.
OF_TORCH: dict[str, type[nn.Module]] = {"elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU}


def activation_names() -> list[str]:
    """Every name that `patch` accepts: `crrelu`, then the names in transformers' ACT2FN, then torch's others."""
    from transformers.activations import ACT2CLS

    return ["crrelu", *ACT2CLS, *(name for name in OF_TORCH if name not in ACT2CLS)]


def build_activation(
    name: str,
    num_channels: int | None = None,
    epsilon_per: str = "layer",
    epsilon_init: float = 0.01,
    fitted: bool = False,
    calibrated: bool = False,
) -> nn.Module:
    """Builds a new activation module by name.

    ε is float32, of shape `(1,)` or `(num_channels,)`. A fitted CRReLU also has a centre and a width; a calibrated
    activation also has scale, shift, gain and offset, `(num_channels,)` each.
    """
    from transformers.activations import ACT2CLS, ACT2FN

    if name == "crrelu":
        made = FittedCRReLU if fitted else CRReLU
        width = num_channels if epsilon_per == "channel" else None
        return made(width, epsilon_init, calibrated=num_channels if calibrated else None)
    if name not in ACT2CLS and name not in OF_TORCH:
        raise InputError(f"unknown activation {name!r}; choose one of {', '.join(activation_names())}")
    module: nn.Module = ACT2FN[name] if name in ACT2CLS else OF_TORCH[name]()
    if calibrated:
        assert num_channels is not None
        module = Calibrated(module, num_channels)
    module.__dict__["activation_name"] = name
    return module


def reset_activation(module: nn.Module, names: Iterable[str]) -> None:
    """Sets the named parameters and buffers of an activation, created empty, to their start values, in place."""
    names = list(names)
    own = names if isinstance(module, CRReLU) else [name for name in names if name in AFFINE]
    if isinstance(module, AffineModule):
        module.reset_parameters(own)
    if len(own) < len(names):
        fresh = build_activation(module.__dict__["activation_name"]).state_dict()
        state = module.state_dict()
        for name in names:
            if name not in own:
                state[name].copy_(fresh[name.removeprefix("activation.")])


def is_ours(module: Any) -> bool:
    """Whether an activation is CRReLU, or was made by `build_activation`."""
    return isinstance(module, CRReLU) or "activation_name" in module.__dict__


def activation_name(module: nn.Module) -> str:
    """The activation's name in transformers' ACT2FN, `"crrelu"` for ours, else the name of its class."""
    from transformers.activations import ACT2CLS

    if type(module).__name__ == PEFT_WRAPPER:
        return activation_name(cast(nn.Module, module.original_module))
    if isinstance(module, CRReLU):
        return "crrelu"
    # One class may serve several names (gelu_python, gelu_10, ...): the name stored by the swap is the exact one.
    remembered = module.__dict__.get("activation_name")
    if remembered:
        return remembered
    for name, entry in {**ACT2CLS, **OF_TORCH}.items():
        if type(module) is (entry[0] if isinstance(entry, tuple) else entry):
            return name
    return type(module).__name__
