"""The hook into transformers: `from_pretrained` and `from_config` build a patched model where the config says so."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crrelu_llm.activation import AFFINE, AffineModule, CRReLU
from crrelu_llm.compat.transformers import extend
from crrelu_llm.errors import InputError
from crrelu_llm.patching import guard, section, standalone
from crrelu_llm.patching.activations import OF_TORCH, build_activation, is_ours, reset_activation
from crrelu_llm.patching.modules import fused, hidden
from crrelu_llm.patching.modules.replace import swap_in

logger = logging.getLogger("crrelu_llm")
_INSTALLED = "_crrelu_installed"  # our own flag: the name in ACT2FN may belong to someone else


def install_hook() -> None:
    """Makes transformers build patched models; called once, after the import of transformers' modeling_utils."""
    from transformers import PreTrainedModel
    from transformers.activations import ACT2FN

    if getattr(PreTrainedModel, _INSTALLED, False):
        return
    setattr(PreTrainedModel, _INSTALLED, True)
    ACT2FN["crrelu"] = CRReLU
    for name, activation in OF_TORCH.items():
        ACT2FN.setdefault(name, activation)
    guard.install()
    extend(_swap_from_section, _initialise, _check_what_is_missing, _refuse_unexpected, _complete_saved)


def _initialise(module: Any) -> bool:
    if not is_ours(module) or getattr(module, "_is_hf_initialized", False):
        return False
    reset_activation(module, _missing(module))
    module._is_hf_initialized = True
    return True


def _check_what_is_missing(model: Any) -> None:
    _check_swapped(model)
    _warn_of_missing(model)


def _complete_saved(model: Any, directory: Path) -> None:
    # transformers keeps auto_map, but copies the file only where the model's class came from that file.
    if model._auto_class is None and standalone.is_standalone(vars(model.config)):
        standalone.add_file(directory)


def _swap_from_section(model: Any) -> set[str]:
    """Swaps the sites named in the config; returns the names of the parameters that must stay float32."""
    from transformers.activations import ACT2CLS

    found = section.read(model.config)
    if found is None:
        return set()
    names = set()
    for site in found["sites"]:
        activation = section.activation_of(found, site)
        if site.get("kind") == "functional":
            owner_path, _, attribute = site["path"].rpartition(".")
            owner = section.local_path(model, owner_path)
            if owner is not None:
                hidden.expose(model, [f"{owner}.{attribute}"])
        path = section.local_path(model, site["path"])
        if path is None:  # this is a part of the model, and the site is in another part
            continue
        current = model.get_submodule(path)
        if not (is_ours(current) and "_swapped" in current.__dict__):
            module = build_activation(
                activation,
                site["num_channels"],
                found["epsilon_per"],
                found["epsilon_init"],
                section.is_fitted(found),
                section.is_calibrated(found),
            )
            module.__dict__["_swapped"] = True
            # The activation just built is the original only where no config key was changed.
            swap_in(model, path, module, None if site["original"] in ACT2CLS else current)
        if activation == "crrelu":
            fused.fuse(model, [path], found.get("recompute_activation", False))
        if activation == "crrelu" or section.is_calibrated(found):
            names |= section.float32_names([path])
    for site in found.get("kept", ()):  # built from a config key that names the new activation
        path = section.local_path(model, site["path"])
        if path is not None and site["original"] in ACT2CLS:
            swap_in(model, path, build_activation(site["original"]), None)
    return names


def _check_swapped(model: Any) -> None:
    found = section.read(model.config)
    for site in found["sites"] if found else ():
        path = section.local_path(model, site["path"])
        # A head on the base model, or another class of the same family, has the base model under its prefix.
        if path is None:
            raise InputError(
                f"{model.config._name_or_path}: config.json names the site {site['path']}, "
                f"which {type(model).__name__} does not have; load it with the class it was saved from"
            )


def _refuse_unexpected(model: Any, keys: Iterable[str]) -> None:
    """Refuses the weights of calibrated activations under a config without calibration."""
    plain = {path for path, module in model.named_modules() if isinstance(module, AffineModule)}
    for key in keys:
        path, _, name = key.rpartition(".")
        if name in AFFINE and path in plain:
            raise InputError(
                f"{model.config._name_or_path}: its weights have calibrated activations ({key}), but its config.json "
                "does not; its files do not belong together: patch the original checkpoint again"
            )


def _warn_of_missing(model: Any) -> None:
    sites: dict[tuple[str, ...], list[str]] = {}
    start: dict[str, float] = {}
    for path, module in model.named_modules():
        if not isinstance(module, AffineModule):
            continue
        # With device_map, an offloaded tensor is on the meta device; a missing one never is.
        missing = [
            name for name in _missing(module) if name in module.start_values and not getattr(module, name).is_meta
        ]
        some = [name for name in AFFINE if name in missing]
        if some and len(some) < len(AFFINE):
            raise InputError(
                f"{model.config._name_or_path}: the checkpoint has only some of {path}'s {', '.join(AFFINE)}: it "
                f"lacks {', '.join(some)}; its files do not belong together: patch the original checkpoint again"
            )
        start |= {name: module.start_values[name] for name in missing}
        for names in [*((name,) for name in missing if name not in some), *([AFFINE] if some else [])]:
            sites.setdefault(names, []).append(path)
    for names, paths in sites.items():
        logger.warning(
            "%s: the checkpoint has no %s for %d of its sites (first: %s); they start at %s",
            model.config._name_or_path,
            ", ".join(names),
            len(paths),
            paths[0],
            ", ".join(f"{start[name]:g}" for name in names),
        )


def _missing(module: Any) -> list[str]:
    """Names of an activation's parameters and buffers that got no value from a checkpoint."""
    tensors = module.state_dict(keep_vars=True)
    return [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
