"""Swaps the activation of every site for another one, and restores the originals."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.fitted_activation import FittedCRReLU
from crrelu_llm.patching import calibration, guard, section
from crrelu_llm.patching.activations import activation_name, build_activation
from crrelu_llm.patching.calibration.finished_layers import Progress
from crrelu_llm.patching.calibration.pixels import calibration_pixels
from crrelu_llm.patching.calibration.records import Record
from crrelu_llm.patching.calibration.tokens import calibration_blocks
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.modules import fused, hidden
from crrelu_llm.patching.modules.replace import swap_in
from crrelu_llm.patching.sites import LeftAlone, Site, survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("crrelu_llm")


@dataclass
class PatchReport:
    """The result of a patch: one entry per site, and the activations that were left alone.

    Attributes:
        sites: `{path, original, num_channels, epsilon_mean, center, width, scale_mean, relative_error,
            relative_error_naive, kept, note}` each. `center` and `width` are None unless the density is fitted.
            `relative_error` is the weighted root mean square of (new − original) over the original's, on the same
            inputs, at the MLP's product on held-back tokens (massive activations weigh less).
            `relative_error_naive` is the same error with ε at its start value (and with the fitted centre and width).
            Both are None where no calibration text was read. `kept` is the level that the site ended with; `note`
            says why that level is lower than requested.
        skipped: `{path, reason}` each.
        calibration: `{seconds, forward_seconds}`: the duration of a calibration, and the part of it spent in two
            forward passes over the text (None where an earlier call's layers were restored). None without calibration.
    """

    model_type: str
    config: PatchConfig
    sites: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    calibration: dict[str, float | None] | None = None


def patch(
    model: PreTrainedModel,
    activation: str | PatchConfig = "crrelu",
    *,
    tokenizer: Any = None,
    blocks: torch.Tensor | None = None,
    progress: Progress | None = None,
    compared: dict[str, nn.Module] | None = None,
    **options: Any,
) -> PatchReport:
    """Swaps every MLP activation of `model`, in place, and records the patch in its config.

    `model.save_pretrained(...)` then writes a checkpoint that plain `AutoModelForCausalLM.from_pretrained`
    (`AutoModelForImageClassification` for an image model) reloads in any process that has imported `crrelu_llm`. A
    patched model is first unpatched where possible: the report then names its original activations as the originals.

    Args:
        model: A Hugging Face causal LM, or another head on the same backbone (before any adapter is added).
        activation: The target's name, `0-5=relu,6-=crrelu` for one per layer, or a whole `PatchConfig`.
        tokenizer: The tokenizer, or for an image model its image processor; needed to calibrate without `blocks`.
        blocks: Calibration text as token ids, `(blocks, tokens)`, int64, or the pixels of images; they replace
            `calibration_data`.
        progress: Where a calibration stores its finished layers (set by `patch_checkpoint`).
        compared: By path, the activations that a calibration imitates instead of the original ones (see
            `trained_activations`; set by `patch_checkpoint`).
        **options: Fields of `PatchConfig`; they override those of a given `PatchConfig`.

    Returns:
        The swapped sites, with the ε and error of each, and the activations that were left alone.

    Raises:
        InputError: Unknown activation or option, a model without sites or already patched in this way, kernels that
            replace whole MLPs, or calibration without a tokenizer. The model is then unchanged, unless a calibration
            that changes weights was interrupted; the message says so.
    """
    known = [entry.name for entry in fields(PatchConfig)]
    for name in options:
        if name not in known:
            raise InputError(f"unknown option {name!r}; a patch takes {', '.join(known)}")
    if isinstance(activation, PatchConfig):
        config = replace(activation, **options)
    else:
        config = PatchConfig(activation, **options)
    if hasattr(model, "peft_config"):
        raise InputError("the model has adapters: patch the base model, then add adapters (or merge them first)")
    found = section.read(model.config)
    if found is None:
        return _patch(model, config, tokenizer, blocks, progress, compared or {})
    section.check_may_be_patched_again(found, config, "the model")
    modules = {path: model.get_submodule(path) for path in _sites_of(model, found)}
    compared = trained_activations(model, config)
    unpatch(model)
    try:
        return _patch(model, config, tokenizer, blocks, progress, compared)
    except BaseException as error:
        found["weights_changed"] |= getattr(error, "weights_changed", False)
        hidden.expose(model, modules)
        for path, module in modules.items():
            swap_in(model, path, module, None)
        _fuse(model, modules, found.get("recompute_activation", False))
        section.put_back(model.config, found)
        _keep_in_float32(model, modules)
        raise


def _patch(
    model: PreTrainedModel,
    config: PatchConfig,
    tokenizer: Any,
    blocks: torch.Tensor | None,
    progress: Progress | None,
    compared: dict[str, nn.Module],
) -> PatchReport:
    every_site, left_alone = survey(model, config.parts)
    activations = assigned(every_site, config)
    sites = [site for site in every_site if site.path in activations]
    kept = [site for site in every_site if site.path not in activations]
    left_alone += [LeftAlone(site.path, site.original, "its layer was not selected") for site in kept]
    if config.calibrates:
        blocks = _calibration_text(model, config, tokenizer, blocks)
    paths = [site.path for site in sites]
    guard.check_forwards(model, paths)
    originals: dict[str, nn.Module] = {}

    def build(site: Site) -> nn.Module:
        return build_activation(
            activations[site.path],
            site.num_channels,
            config.epsilon_per,
            config.epsilon_init,
            config.fits_density,
            config.fits,
        )

    def swap(site: Site, module: nn.Module) -> None:
        swap_in(model, site.path, module, originals[site.path])

    done: calibration.Calibration | None = None
    try:
        hidden.expose(model, paths)
        originals |= {path: model.get_submodule(path) for path in paths}
        keys = section.mlp_config_keys(model, every_site)
        if config.calibrates:
            assert blocks is not None
            for path, module in compared.items():
                swap_in(model, path, module, None)
            done = calibration.calibrate(model, sites, blocks, config, build, swap, progress)
        else:
            for site in sites:
                swap(site, build(site))
    except BaseException:
        for path, original in originals.items():
            swap_in(model, path, original, None)
        hidden.conceal(model, paths)
        raise
    _fuse(model, paths, config.recompute_activation)
    records = {} if done is None else done.records
    changed = bool(compared) or any(entry.changed_weights for entry in records.values())
    section.write(model.config, config, sites, keys, changed, kept if keys else [], activations)
    _keep_in_float32(model, paths)
    report = _report(model, config, sites, left_alone, records)
    if done is not None:
        report.calibration = {"seconds": done.seconds, "forward_seconds": done.forward_seconds}
    return report


def assigned(sites: list[Site], config: PatchConfig) -> dict[str, str]:
    """The new activation of each site in the selected layers, by path."""
    layers = list(dict.fromkeys(site.layer for site in sites))
    wanted = {layers[number]: name for number, name in config.by_layer(len(layers)).items()}
    return {site.path: wanted[site.layer] for site in sites if site.layer in wanted}


def _fuse(model: nn.Module, paths: Iterable[str], recompute: bool) -> None:
    """Fuses the MLPs at those `paths` where the activation is CRReLU."""
    fused.fuse(model, [path for path in paths if isinstance(model.get_submodule(path), CRReLU)], recompute)


def trained_activations(model: PreTrainedModel, config: PatchConfig) -> dict[str, nn.Module]:
    """The activations, by path, for which a patched model's weights were trained, refitted or folded.

    Another calibration imitates these activations, not the originals. Empty where the weights are the original ones.
    """
    found = section.read(model.config)
    if found is None or not found.get("weights_changed", False) or not config.calibrates:
        return {}
    return {path: model.get_submodule(path) for path in _sites_of(model, found)}


def unpatch(model: PreTrainedModel, original: nn.Module | None = None) -> None:
    """Restores the original activations, in place, and removes the section from the config.

    The module tree and the config are then exactly as before `patch`, even for a reloaded checkpoint.

    Args:
        model: A patched model.
        original: The model before the patch; its weights are copied. Without it, projections that `refit` changed
            stay changed, with a warning. After `none` or `fit`, the model is restored bit for bit.

    Raises:
        InputError: The model is not patched, its original activations had parameters that its checkpoint lacks, or
            `original` is another model.
    """
    if hasattr(model, "peft_config"):
        raise InputError("the model has adapters: unpatch the base model (merge or unload the adapters first)")
    found = section.read(model.config)
    if found is None:
        raise InputError("the model is not patched: its config has no crrelu section")
    sites = _sites_of(model, found)
    activations = {path: _original(model, path, site) for path, site in sites.items()}
    fused.unfuse(model, activations)
    for path, activation in activations.items():
        if hidden.is_exposed(model.get_submodule(path.rpartition(".")[0])):
            hidden.conceal(model, [path])
        else:
            swap_in(model, path, activation, None)
    for name in section.float32_names(sites):
        (getattr(model, "_keep_in_fp32_modules_strict", None) or set()).discard(name)
    section.remove(model.config)
    if original is not None:
        try:
            model.load_state_dict(original.state_dict())
        except RuntimeError as error:
            raise InputError("unpatch: `original` is not the model that was patched: its weights differ") from error
    elif found.get("weights_changed"):
        logger.warning(
            "training, refit or --fold has changed the weights since the patch, and unpatch keeps the changes: to get "
            "the original model, call unpatch(model, original=...), or load the original checkpoint"
        )


def _sites_of(model: nn.Module, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sites of a section, by their paths in `model` (the whole model or its base model)."""
    sites = {section.local_path(model, site["path"]): site for site in found["sites"]}
    return {path: site for path, site in sites.items() if path is not None}


def _original(model: nn.Module, path: str, site: dict[str, Any]) -> nn.Module:
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    held = getattr(owner, attribute).__dict__.get("_original")
    if held or hidden.is_exposed(owner):  # concealed instead of restored: the returned module is not used
        return held[0] if held else nn.Identity()
    original = build_activation(site["original"])
    if next(original.parameters(), None) is not None:
        raise InputError(
            f"{site['path']}: the original {site['original']} had its own parameters, which a patched checkpoint "
            "does not hold; start from the original checkpoint"
        )
    return original


def _calibration_text(
    model: PreTrainedModel, config: PatchConfig, tokenizer: Any, blocks: torch.Tensor | None
) -> torch.Tensor:
    if blocks is not None:
        return blocks
    images = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    if tokenizer is None:
        what = f'calibration="{config.calibration}"' if config.fits else f'density="{config.density}"'
        plain = '; or use the plain swap: calibration="none"' if config.fits else ""
        needed = "image processor" if images else "tokenizer"
        raise InputError(f"{what} needs the {needed}: patch(model, ..., tokenizer=...){plain}")
    if images:
        return calibration_pixels(config.calibration_data, tokenizer, config.calibration_images, model.config)
    return calibration_blocks(config.calibration_data, tokenizer, config.calibration_tokens, model.config)


def _keep_in_float32(model: PreTrainedModel, paths: Iterable[str]) -> None:
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = strict | section.float32_names(paths)


def _report(
    model: PreTrainedModel,
    config: PatchConfig,
    sites: list[Site],
    left_alone: list[LeftAlone],
    done: dict[str, Record],
) -> PatchReport:
    report = PatchReport(model.config.model_type, copy.copy(config))
    for site in sites:
        module = model.get_submodule(site.path)
        entry = {
            "path": site.path,
            "original": site.original,
            "num_channels": site.num_channels,
            "epsilon_mean": module.epsilon.mean().item() if isinstance(module, CRReLU) else None,
            "center": module.center.item() if isinstance(module, FittedCRReLU) else None,
            "width": module.width.item() if isinstance(module, FittedCRReLU) else None,
            "scale_mean": 1.0,
            "relative_error": None,
            "relative_error_naive": None,
            "kept": "none",
            "note": None,
        }
        if config.is_mixture:
            entry["activation"] = activation_name(module)
        if site.path in done:
            entry |= asdict(done[site.path])
            entry.pop("changed_weights")
        report.sites.append(entry)
    report.skipped = [{"path": item.path, "reason": f"{item.activation}: {item.reason}"} for item in left_alone]
    return report
