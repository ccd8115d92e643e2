"""Optimiser parameter groups for ε and for the four of a calibrated activation, with their own learning rates."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from crrelu_llm.activation import AFFINE, AffineModule, Calibrated, CRReLU
from crrelu_llm.compat.peft import site_path
from crrelu_llm.errors import InputError


def epsilon_modules(model: nn.Module) -> dict[str, CRReLU]:
    """The CRReLU modules of a model by the path of their site; under PEFT, the trained copies.

    Paths are those of the base model, without wrappers (PEFT, DDP, torch.compile).
    """
    return {path: module for path, module in affine_modules(model).items() if isinstance(module, CRReLU)}


def affine_modules(model: nn.Module) -> dict[str, AffineModule]:
    """The CRReLU modules of a model and other calibrated activations; otherwise like `epsilon_modules`."""
    found: dict[str, AffineModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, AffineModule):
            path = site_path(name)
            # PEFT keeps the original beside the trained copy; the copy comes later and replaces the original here.
            if path not in found or ".modules_to_save." in f".{name}.":
                found[path] = module
    return found


def check_learnable(model: nn.Module, sites: Iterable[str]) -> None:
    """Raises InputError if an ε that should be learned would silently stay fixed, because a library has renamed or
    frozen the modules around it.

    Args:
        sites: The paths in the config's section.
    """
    found = epsilon_modules(model)
    trained = [path for path, module in found.items() if module.epsilon.requires_grad]
    lost = [site for site in sites if not any(_same_site(site, path) for path in trained)]
    if lost:
        raise InputError(
            f"ε of {len(lost)} sites would not be trained (first: {lost[0]}): the adapter's target_parameters or "
            "modules_to_save include the modules around ε, where PEFT can neither train nor save it; change these "
            "options, or set epsilon_learning_rate: 0"
        )


def _same_site(site: str, path: str) -> bool:
    """Whether both paths name the same site; with another head, or for the base model, the prefix may differ."""
    return f".{site}".endswith(f".{path}") or f".{path}".endswith(f".{site}")


def train_affine(model: nn.Module) -> None:
    """Makes scale, shift, gain and offset of every calibrated activation trainable; under PEFT, in the trained copy.

    Other parameters of the copy, such as PReLU's, stay frozen, as they are when the four are not trained.
    """
    for module in affine_modules(model).values():
        if module.is_calibrated:
            module.train_affine()
            if hasattr(model, "peft_config") and isinstance(module, Calibrated):
                for inner in module.activation.modules():
                    for name in dict(inner.named_parameters(recurse=False)):
                        freeze(model, inner, name)


def freeze(model: nn.Module, module: nn.Module, name: str) -> None:
    """Freezes a parameter of an activation; under PEFT it becomes a buffer.

    When PEFT enables adapters again, as after every reference pass of DPO, it makes all parameters of a copied module
    trainable: they would get gradients that are never zeroed and that gradient clipping counts.
    """
    value = getattr(module, name)
    if hasattr(model, "peft_config"):
        delattr(module, name)
        module.register_buffer(name, value.detach())
    else:
        value.requires_grad_(False)


def split_off_epsilon(optimizer: Any, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
    """Moves every trainable ε of `model` from the optimiser's groups into a separate group, in place."""
    _split_off(optimizer, [module.epsilon for module in epsilon_modules(model).values()], learning_rate, weight_decay)


def split_off_affine(optimizer: Any, model: nn.Module, learning_rate: float) -> None:
    """Does the same for scale, shift, gain and offset, without weight decay, which would draw scale and gain to 0."""
    four = [getattr(module, name) for module in affine_modules(model).values() for name in AFFINE]
    _split_off(optimizer, [value for value in four if isinstance(value, nn.Parameter)], learning_rate, 0.0)


def _split_off(optimizer: Any, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    ours = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    optimizer.add_param_group({"params": parameters, "lr": learning_rate, "weight_decay": weight_decay})
