"""ε in an optimiser: a parameter group of its own, with its own learning rate and weight decay."""

from typing import Any

from torch import nn

from crrelu_llm.activation import CRReLU


def epsilon_modules(model: nn.Module) -> dict[str, CRReLU]:
    """The CRReLU modules of a model by the path of their site; under PEFT, the ones that are trained.

    Paths are those of the base model, whatever wraps it (PEFT, DDP, torch.compile).
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CRReLU):
            path = site_path(name)
            # PEFT keeps the original beside the trained copy; the copy comes later and replaces it here.
            if path not in found or ".modules_to_save." in f".{name}.":
                found[path] = module
    return found


def site_path(module_path: str) -> str:
    """A module's path without what wrappers put into it."""
    path = f".{module_path}."
    for prefix in (
        ".base_model.model.",
        ".module.",
        "._orig_mod.",
        "._fsdp_wrapped_module.",
        "._checkpoint_wrapped_module.",
    ):
        path = path.replace(prefix, ".")
    for part in (".original_module.", ".modules_to_save.default.", ".modules_to_save."):
        path = path.replace(part, ".")
    return path.strip(".")


def split_off_epsilon(optimizer: Any, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
    """Moves every trainable ε of `model` out of the optimiser's groups into one of its own, in place."""
    epsilons = [m.epsilon for m in epsilon_modules(model).values() if m.epsilon.requires_grad]
    if not epsilons:
        return
    ours = {id(parameter) for parameter in epsilons}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    optimizer.add_param_group({"params": epsilons, "lr": learning_rate, "weight_decay": weight_decay})
