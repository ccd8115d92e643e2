"""The `crrelu` section of config.json: what a patched checkpoint says about itself."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crrelu_llm.activation import AFFINE, CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import MOMENTS
from crrelu_llm.patching import mixture
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 2: CRReLU with a centre and a width; 3: calibrated; 4: some layers alone; 5: one activation a layer; else 1
VERSION = 5
_KEYS = {"activation", "epsilon_per", "epsilon_init", "config_keys", "sites"}
_SITE_KEYS = {"path", "original", "num_channels"}
_KEY = re.compile(r"(^|_)(act|afn|activation)($|_)")
logger = logging.getLogger(__name__)


def read(config: Any) -> dict[str, Any] | None:
    """Returns the section of a config, or None for a model that is not patched.

    Raises:
        InputError: The section was written by a newer version of this package, or is invalid.
    """
    section = getattr(config, "crrelu", None)
    if section is None:
        return None
    where = getattr(config, "_name_or_path", "") or "the model's config"
    if not isinstance(section, dict) or not isinstance(section.get("version"), int):
        raise InputError(f"{where}: the crrelu section of config.json is not one that crrelu_llm wrote")
    if section["version"] > VERSION:
        raise InputError(
            f"{where}: patched by a newer crrelu_llm (section version {section['version']}, this one reads up to "
            f"{VERSION}); upgrade crrelu_llm"
        )
    if not section.keys() >= _KEYS or not all(site.keys() >= _SITE_KEYS for site in section["sites"]):
        raise InputError(f"{where}: the crrelu section of config.json is not complete; patch the checkpoint again")
    return section


def is_fitted(section: dict[str, Any]) -> bool:
    """Whether the activations of a patched model have their own centre and width."""
    return section.get("density", "standard") == "fitted"


def is_calibrated(section: dict[str, Any]) -> bool:
    """Whether the activations of a patched model have scale, shift, gain and offset."""
    return section.get("calibrated", False)


def activation_of(section: dict[str, Any], site: dict[str, Any]) -> str:
    """The new activation of a site of a section."""
    return site.get("activation", section["activation"])


def crrelu_paths(section: dict[str, Any]) -> list[str]:
    """The paths of the sites that got CRReLU."""
    return [site["path"] for site in section["sites"] if activation_of(section, site) == "crrelu"]


def float32_names(paths: Iterable[str]) -> set[str]:
    """Suffixes of the tensor names that stay float32 in a model of a lower dtype, for the sites at `paths`."""
    attributes = {path.rpartition(".")[2] for path in paths}
    return {f"{attribute}.{name}" for attribute in attributes for name in ("epsilon", *MOMENTS, *AFFINE)}


def local_path(model: nn.Module, path: str) -> str | None:
    """A site's path as seen from `model` (the whole model or its base model); None if neither has it."""
    for candidate in (path, path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def check_may_be_patched_again(section: dict[str, Any], patch_config: PatchConfig, name: str) -> None:
    """Checks that a model with this section, called `name`, may be patched to `patch_config`.

    Raises:
        InputError: The model has already been patched in the same way; or its weights were trained, refitted or folded
            for its present activation, and the patch does not go back to the original one.
    """
    activation = section["activation"]
    originals = {site["original"] for site in section["sites"]}
    goes_back = originals == {patch_config.activation}
    if section.get("weights_changed", False) and goes_back and patch_config.selects:
        raise InputError(f"{name}: its weights fit {activation} in every layer; go back without layers and every")
    if section.get("weights_changed", False) and not goes_back:
        raise InputError(
            f"{name} is already patched to {activation}, and its weights were fitted to that; start from the original "
            f"checkpoint, or go back with activation {' or '.join(sorted(originals))}"
        )
    if activation != patch_config.activation:
        return
    # keys that older versions did not write
    section = {"recompute_activation": False, "density": "standard"} | section
    own = ("epsilon_per", "epsilon_init", "recompute_activation", "density")
    keys = own if patch_config.uses_crrelu else ()
    same = all(section[key] == getattr(patch_config, key) for key in keys)
    same = same and not patch_config.selects and (patch_config.is_mixture or not section.get("kept"))
    if same and not patch_config.calibrates and not is_calibrated(section):
        raise InputError(f"{name} is already patched to {activation} with these options; there is nothing to do")


def write(
    config: Any,
    patch_config: PatchConfig,
    sites: list[Site],
    keys: dict[str, str],
    weights_changed: bool = False,
    kept: Sequence[Site] = (),
    activations: Mapping[str, str] | None = None,
) -> None:
    """Adds the section to a config, and sets the family's own activation keys to the new activation.

    Args:
        config: The model's.
        patch_config: The patch.
        sites: What was patched.
        keys: The keys, with their previous values.
        weights_changed: Whether the patch changed weights.
        kept: Sites that keep the original activation, which the keys no longer name.
        activations: The new activation by the path of the site, if there are several.
    """
    several = (activations or {}) if patch_config.is_mixture else {}
    config.crrelu = {
        "version": _version(bool(several), bool(kept), patch_config.fits, patch_config.fits_density),
        "activation": patch_config.activation,
        "epsilon_per": patch_config.epsilon_per,
        "epsilon_init": patch_config.epsilon_init,
        "config_keys": keys,
        "weights_changed": weights_changed,
        "recompute_activation": patch_config.recompute_activation,
        **({"density": patch_config.density} if patch_config.fits_density else {}),
        **({"calibrated": True, "calibration": patch_config.calibration} if patch_config.fits else {}),
        "sites": [
            {"path": site.path, "original": site.original, "num_channels": site.num_channels, "kind": site.kind}
            | ({"activation": several[site.path]} if several else {})
            for site in sites
        ],
        **({"kept": [{"path": site.path, "original": site.original} for site in kept]} if kept else {}),
    }
    for key in keys:
        _set(config, key, _key_value(patch_config.activation))


def _version(several: bool, kept: bool, calibrated: bool, fitted: bool) -> int:
    return 5 if several else 4 if kept else 3 if calibrated else 2 if fitted else 1


def _key_value(activation: str) -> str:
    """The value of the family's own keys: for several activations, a name unknown to programs without this package."""
    return "crrelu" if mixture.is_mixture(activation) else activation


def make_plain(config: Any) -> None:
    """Records that the activations no longer have scale, shift, gain and offset, now folded into the weights."""
    section = {key: value for key, value in config.crrelu.items() if key not in ("calibrated", "calibration")}
    several = mixture.is_mixture(section["activation"])
    version = _version(several, bool(section.get("kept")), False, is_fitted(section))
    config.crrelu = section | {"weights_changed": True, "version": version}


def put_back(config: Any, section: dict[str, Any]) -> None:
    """Undoes `remove`."""
    config.crrelu = section
    for key in section["config_keys"]:
        _set(config, key, _key_value(section["activation"]))


def remove(config: Any) -> None:
    """Removes the section, and restores the original values of the family's keys."""
    for key, value in config.crrelu["config_keys"].items():
        _set(config, key, value)
    delattr(config, "crrelu")


def mlp_config_keys(model: "PreTrainedModel", sites: list[Site]) -> dict[str, str]:
    """Config keys (dotted) that set the activation of sites and nothing else, with their values.

    Found by trial: the model is built again on the meta device with one key changed, and the key counts if only sites
    changed. A model with a convolution gets none: those families pass the same key to a functional convolution, whose
    activation is not a module.
    """
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return {}
    paths = {site.path for site in sites}
    keys = {}
    for key, value in _candidates(model.config.to_dict()):
        config = copy.deepcopy(model.config)
        _set(config, key, "crrelu")
        try:
            with torch.device("meta"):
                probe = type(model)(config)
        except Exception as error:  # the family looks the name up in its own table
            logger.debug("config key %s is left alone: %s", key, error)
            continue
        changed = {path for path, module in probe.named_modules() if isinstance(module, CRReLU)}
        if changed and changed <= paths:
            keys[key] = value
    return keys


def _candidates(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    from transformers.activations import ACT2CLS

    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            yield from _candidates(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value in ACT2CLS and _KEY.search(key):
            yield prefix + key, value


def _set(config: Any, key: str, value: str) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)
