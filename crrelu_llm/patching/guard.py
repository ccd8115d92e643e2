"""Prevents the silent loss of a swap: kernels that replace whole MLPs never call the activation of the MLP."""

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from crrelu_llm import _transformers_hook
from crrelu_llm.errors import InputError
from crrelu_llm.patching import section

logger = logging.getLogger("crrelu_llm")

# Liger's options that replace the forward of MLPs; its other kernels (norms, rotary embeddings, losses) are harmless.
LIGER_MLP_KERNELS = ("swiglu", "geglu", "relu_squared")
# Implementations of fused experts that call the activation module. Others (sonicmoe) read its name in the config.
_EXPERTS = ("eager", "batched_mm", "grouped_mm", "deepgemm")


def check(model: nn.Module) -> None:
    """Checks that a patched model, even inside PEFT's wrapper, computes its new activations; other models pass.

    Raises:
        InputError: Something has replaced the forward of a module that should call one of the new activations.
    """
    base = _base(model)
    found = section.read(getattr(base, "config", None))
    paths = [section.local_path(base, site["path"]) for site in found["sites"]] if found else []
    check_forwards(base, [path for path in paths if path is not None])


def _base(model: Any) -> Any:
    # transformers' own models also get a peft_config when an adapter is added without a wrapper.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_forwards(model: nn.Module, paths: Iterable[str]) -> None:
    """Checks that the modules between the layers of a model and its activations run their own class's forward.

    Args:
        model: The model that `paths` start from.
        paths: Where its activations are, or will be.

    Raises:
        InputError: A kernel library has replaced such a forward, so that the activation would not be computed.
    """
    checked = set()
    for path in paths:
        components = path.split(".")[:-1]
        first = next((at for at, component in enumerate(components) if component.isdigit()), len(components) - 1)
        for end in range(first + 1, len(components) + 1):
            owner = ".".join(components[:end])
            if owner not in checked:
                checked.add(owner)
                _check_module(owner, model.get_submodule(owner))


def _check_module(path: str, module: nn.Module) -> None:
    # accelerate's hooks (device_map) keep the original forward and call it.
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if forward is not None and getattr(forward, "__func__", forward) is not type(module).forward:
        raise InputError(
            f"{path}: a kernel library has replaced the forward of {type(module).__name__}, so that a swapped "
            "activation would not be computed; load and train the model without kernels for whole MLPs"
        )
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in (None, *_EXPERTS) and hasattr(module, "_apply_gate"):
        raise InputError(
            f"{path}: the experts implementation {implementation} does not call the activation module; set "
            f"experts_implementation to one of {', '.join(_EXPERTS)}"
        )


def refuse_mlp_kernels(liger_kernel_config: dict[str, Any], where: str = "") -> None:
    """Raises InputError, starting with `where`, if Liger's options enable a kernel that replaces whole MLPs."""
    for name in LIGER_MLP_KERNELS:
        if liger_kernel_config.get(name):
            raise InputError(
                f"{where}liger_kernel_config: {name}: true replaces the MLPs, and the swapped activation with them; "
                "leave it out"
            )


def install() -> None:
    """Adds the check to both ways of putting kernels into a model: `use_kernels` and `use_liger_kernel`."""
    from transformers import PreTrainedModel

    set_use_kernels = PreTrainedModel.set_use_kernels

    @functools.wraps(set_use_kernels)
    def set_then_check(self: Any, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        set_use_kernels(self, use_kernels, *args, **kwargs)
        if use_kernels:
            check(self)

    PreTrainedModel.set_use_kernels = set_then_check  # type: ignore[method-assign]
    _transformers_hook.arrange(_install_in_liger, "transformers.integrations.liger")


def _install_in_liger() -> None:
    liger = sys.modules["transformers.integrations.liger"]
    liger.apply_liger_kernel = _without_mlp_kernels(liger.apply_liger_kernel)  # type: ignore[attr-defined]
    trainer = sys.modules.get("transformers.trainer")
    if trainer is not None and hasattr(trainer, "apply_liger_kernel"):  # imported there by name
        trainer.apply_liger_kernel = liger.apply_liger_kernel  # type: ignore[attr-defined]


def _without_mlp_kernels(apply: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(apply)
    def apply_then_check(model: Any, kernel_config: dict[str, Any] | None) -> None:
        if section.read(getattr(_base(model), "config", None)) is not None:
            options = kernel_config or {}
            refuse_mlp_kernels(options)
            logger.warning("use_liger_kernel: the MLPs keep their swapped activation; Liger's other kernels are used")
            kernel_config = options | dict.fromkeys(LIGER_MLP_KERNELS, False)
        apply(model, kernel_config)
        check(model)

    return apply_then_check
