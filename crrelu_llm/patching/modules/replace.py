"""Replaces the activation at a path of a model, on the device where its owner computes."""

from typing import Any

import torch
from torch import nn

from crrelu_llm.activation import CRReLU


def swap_in(model: nn.Module, path: str, module: nn.Module, original: nn.Module | None) -> None:
    """Sets the activation at `path`; the original is kept outside the module tree, for `unpatch`."""
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    # A gate that is a separate module (Inkling 2) has the weights beside it, not inside it.
    device = _device(owner) or _device(model.get_submodule(owner_path.rpartition(".")[0]))
    if device is not None and device != torch.device("cpu"):
        module.to(device)
    module.train(owner.training)
    if original is not None and not isinstance(original, CRReLU):
        # In a list, so that nn.Module does not register it: its parameters are not part of the patched model.
        module.__dict__["_original"] = [original]
    setattr(owner, attribute, module)


def _device(owner: nn.Module) -> torch.device | None:
    """The device where an MLP computes: that of its weights, or the one that accelerate's hooks move them to."""
    for module in owner.modules():
        hook: Any = module.__dict__.get("_hf_hook")
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False) and part.execution_device is not None:
                return torch.device(part.execution_device)
    reference = next(owner.parameters(), None)
    return None if reference is None else reference.device
