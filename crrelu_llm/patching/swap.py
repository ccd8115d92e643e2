"""Swaps the activation of every site for another one, and puts the originals back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crrelu_llm.activation import CRReLU
from crrelu_llm.eafo.fitted import FittedCRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.patching import families, fusion, guard, section
from crrelu_llm.patching.sites import LeftAlone, Site, survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from crrelu_llm.patching.calibration import Calibrated
    from crrelu_llm.patching.calibration.progress import Progress

logger = logging.getLogger("crrelu_llm")
CALIBRATIONS = ("none", "fit", "refit", "reconstruct")
EPSILON_PER = ("layer", "channel")
DENSITIES = ("standard", "fitted")


@dataclass
class PatchConfig:
    """How to patch a model.

    Attributes:
        activation: `"crrelu"`, or any name of transformers' ACT2FN (`"gelu"`, `"relu"`, `"silu"`, `"prelu"`, ...).
        epsilon_init: Start value of ε where no calibration sets it (the paper's 0.01).
        epsilon_per: One ε a `"layer"`, shape `(1,)`, or one a `"channel"`, shape `(channels,)`.
        calibration: How the patch is fitted to text, so that the model keeps its function: `"none"`; `"fit"`: ε by
            weighted least squares against the original activation; `"refit"`: also two factors a channel, folded into
            the weights, and the following projection by ridge regression; `"reconstruct"`: then a short training of
            each MLP toward the original MLP's output.
        calibration_data: Hub name, local file or directory, or `builtin:docstrings`.
        calibration_tokens: How many tokens of it to use.
        density: The density of pre-activations that CRReLU is the correction for: `"standard"`, N(0, 1), the paper's;
            `"fitted"`, N(μ, σ²) with the moments of each site on the calibration text:
            `relu(x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`.
        recompute_activation: In training, keep no output of CRReLU for the backward pass, but compute it again there:
            less memory, the same gradients bit for bit. Other activations are left as they are.
    """

    activation: str = "crrelu"
    epsilon_init: float = 0.01
    epsilon_per: str = "layer"
    calibration: str = "none"
    calibration_data: str = "builtin:docstrings"
    calibration_tokens: int = 8192
    density: str = "standard"
    recompute_activation: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for the first field that holds an impossible value."""
        names = activation_names()
        if self.activation not in names:
            raise InputError(f"unknown activation {self.activation!r}; choose one of {', '.join(names)}")
        choices_of = {"epsilon_per": EPSILON_PER, "calibration": CALIBRATIONS, "density": DENSITIES}
        for key, allowed in choices_of.items():
            if getattr(self, key) not in allowed:
                quoted = [f'"{value}"' for value in allowed]
                choices = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
                raise InputError(f'{key} must be {choices}, not "{getattr(self, key)}"')
        if self.calibration_tokens <= 0:
            raise InputError(f"calibration_tokens must be positive, not {self.calibration_tokens}")
        if not abs(self.epsilon_init) < float("inf"):
            raise InputError(f"epsilon_init must be a finite number, not {self.epsilon_init}")
        if self.fits_density and self.activation != "crrelu":
            raise InputError(
                f"density: fitted gives crrelu a centre and a width, and {self.activation} has none; leave "
                "density out, or set activation: crrelu"
            )

    @property
    def calibrates(self) -> bool:
        """Whether calibration text will be read: `fit` has nothing to fit in an activation without ε."""
        return self.calibration in ("refit", "reconstruct") or (
            self.activation == "crrelu" and (self.calibration == "fit" or self.fits_density)
        )

    @property
    def fits_density(self) -> bool:
        """Whether each site gets a centre and a width of its own."""
        return self.density == "fitted"


@dataclass
class PatchReport:
    """What a patch did: one entry a site, and the activations that it left alone.

    Attributes:
        sites: `{path, original, num_channels, epsilon_mean, center, width, scale_mean, relative_error,
            relative_error_naive, kept, note}` each. `center` and `width` are None unless the density is fitted.
            `relative_error` is the root mean square of (new − original) over that of the original, given the same
            input, at the MLP's output on tokens that the weights were not fitted to (`fit`: at its product, on all
            tokens), `relative_error_naive` the same with ε at its start (and the centre and width of the site, where
            the density is fitted); None where no calibration text was read. `kept` is the level that the site ended
            with, `note` says why it is a lower one than asked for.
        skipped: `{path, reason}` each.
    """

    model_type: str
    config: PatchConfig
    sites: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def activation_names() -> list[str]:
    """Every name that `patch` takes: `crrelu` first, then transformers' ACT2FN."""
    from transformers.activations import ACT2CLS

    return ["crrelu", *ACT2CLS]


def patch(
    model: PreTrainedModel,
    activation: str | PatchConfig = "crrelu",
    *,
    tokenizer: Any = None,
    blocks: torch.Tensor | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PatchReport:
    """Swaps every MLP activation of `model`, in place, and writes the fact into its config.

    `model.save_pretrained(...)` then gives a checkpoint that plain `AutoModelForCausalLM.from_pretrained` reloads in
    any process that has imported `crrelu_llm`. A patched model is unpatched first, if its original activations can be
    had: the report then names these as the originals.

    Args:
        model: A Hugging Face causal LM, or another head on the same backbone (before any adapter is added).
        activation: The target's name, or a whole `PatchConfig`.
        tokenizer: Needed to calibrate, where no `blocks` are given.
        blocks: Calibration text as token ids, `(blocks, tokens)`, int64; `calibration_data` is then not read.
        progress: Where a calibration keeps its finished layers (`patch_checkpoint` gives it).
        **options: Fields of `PatchConfig`; they win over those of a `PatchConfig` that is given.

    Returns:
        The sites swapped, with ε and the error of each, and what was left alone.

    Raises:
        InputError: Unknown activation or option, a model without sites or already patched in this way, kernels that
            replace whole MLPs, or calibration without a tokenizer. The model is then unchanged, unless a calibration
            that changes weights ended half-way, which the message says.
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
        return _patch(model, config, tokenizer, blocks, progress)
    section.check_may_be_patched_again(found, config, "the model")
    modules = {site["path"]: model.get_submodule(site["path"]) for site in found["sites"]}
    unpatch(model)
    try:
        return _patch(model, config, tokenizer, blocks, progress)
    except BaseException as error:
        found["weights_changed"] |= getattr(error, "weights_changed", False)
        families.expose(model, modules)
        for path, module in modules.items():
            swap_in(model, path, module, None)
        if found["activation"] == "crrelu":
            fusion.fuse(model, modules, found.get("recompute_activation", False))
        section.put_back(model.config, found)
        _keep_epsilon_in_float32(model, modules)
        raise


def _patch(
    model: PreTrainedModel,
    config: PatchConfig,
    tokenizer: Any,
    blocks: torch.Tensor | None,
    progress: Progress | None,
) -> PatchReport:
    sites, left_alone = survey(model)
    if config.calibrates:
        blocks = _calibration_text(model, config, tokenizer, blocks)
    paths = [site.path for site in sites]
    guard.check_forwards(model, paths)
    originals: dict[str, nn.Module] = {}

    def build(site: Site) -> nn.Module:
        return build_activation(
            config.activation, site.num_channels, config.epsilon_per, config.epsilon_init, config.fits_density
        )

    def swap(site: Site, module: nn.Module) -> None:
        swap_in(model, site.path, module, originals[site.path])

    done: dict[str, Calibrated] = {}
    try:
        families.expose(model, paths)
        originals |= {path: model.get_submodule(path) for path in paths}
        keys = section.mlp_config_keys(model, sites)
        if config.calibrates:
            from crrelu_llm.patching.calibration import calibrate

            assert blocks is not None
            done = calibrate(model, sites, blocks, config, build, swap, progress)
        else:
            for site in sites:
                swap(site, build(site))
    except BaseException:
        for path, original in originals.items():
            swap_in(model, path, original, None)
        families.conceal(model, paths)
        raise
    if config.activation == "crrelu":
        fusion.fuse(model, paths, config.recompute_activation)
    section.write(model.config, config, sites, keys, any(entry.changed_weights for entry in done.values()))
    _keep_epsilon_in_float32(model, paths)
    return _report(model, config, sites, left_alone, done)


def unpatch(model: PreTrainedModel, original: nn.Module | None = None) -> None:
    """Puts the original activations back, in place, and takes the section out of the config.

    The module tree and the config are then exactly what they were before `patch`, also for a reloaded checkpoint.

    Args:
        model: A patched model.
        original: The model before the patch, whose weights are copied; without it, weights that a calibration has
            folded or refitted stay changed, and a warning says so.

    Raises:
        InputError: The model is not patched, its original activations had parameters that its checkpoint lacks, or
            `original` is another model.
    """
    if hasattr(model, "peft_config"):
        raise InputError("the model has adapters: unpatch the base model (merge or unload the adapters first)")
    found = section.read(model.config)
    if found is None:
        raise InputError("the model is not patched: its config has no crrelu section")
    activations = {site["path"]: _original(model, site) for site in found["sites"]}
    fusion.unfuse(model, activations)
    for path, activation in activations.items():
        if families.is_exposed(model.get_submodule(path.rpartition(".")[0])):
            families.conceal(model, [path])
        else:
            swap_in(model, path, activation, None)
    for name in section.float32_names(site["path"] for site in found["sites"]):
        (getattr(model, "_keep_in_fp32_modules_strict", None) or set()).discard(name)
    section.remove(model.config)
    if original is not None:
        try:
            model.load_state_dict(original.state_dict())
        except RuntimeError as error:
            raise InputError("unpatch: `original` is not the model that was patched: its weights differ") from error
    elif found.get("weights_changed"):
        logger.warning(
            "the weights around the activations were changed by the calibration and stay so: the model is not what it "
            "was before the patch; give unpatch(model, original=...), or load the original checkpoint"
        )


def _original(model: nn.Module, site: dict[str, Any]) -> nn.Module:
    owner_path, _, attribute = site["path"].rpartition(".")
    owner = model.get_submodule(owner_path)
    held = getattr(owner, attribute).__dict__.get("_original")
    if held or families.is_exposed(owner):  # concealed, not put back: which module is returned does not matter
        return held[0] if held else nn.Identity()
    original = build_activation(site["original"])
    if next(original.parameters(), None) is not None:
        raise InputError(
            f"{site['path']}: the original {site['original']} had parameters of its own, which a patched checkpoint "
            "does not hold; start from the original checkpoint"
        )
    return original


def build_activation(
    name: str,
    num_channels: int | None = None,
    epsilon_per: str = "layer",
    epsilon_init: float = 0.01,
    fitted: bool = False,
) -> nn.Module:
    """A new activation module by its name; ε is float32, of shape `(1,)` or `(num_channels,)`; a fitted CRReLU
    also has a centre and a width."""
    from transformers.activations import ACT2CLS, ACT2FN

    if name == "crrelu":
        return (FittedCRReLU if fitted else CRReLU)(num_channels if epsilon_per == "channel" else None, epsilon_init)
    if name not in ACT2CLS:
        raise InputError(f"unknown activation {name!r}; choose one of {', '.join(activation_names())}")
    module = ACT2FN[name]
    module.__dict__["activation_name"] = name
    return module


def reset_activation(module: nn.Module, names: Iterable[str]) -> None:
    """Sets parameters and buffers of an activation to their start values, in place: they were created empty."""
    if isinstance(module, CRReLU):
        module.reset_parameters(names)
    else:
        fresh = build_activation(module.__dict__["activation_name"]).state_dict()
        state = module.state_dict()
        for name in names:
            state[name].copy_(fresh[name])


def swap_in(model: nn.Module, path: str, module: nn.Module, original: nn.Module | None) -> None:
    """Sets the activation at `path`; the original is remembered outside the module tree, for `unpatch`."""
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    # A gate that is a module of its own (Inkling 2) has the weights beside it, not inside it.
    device = _device(owner) or _device(model.get_submodule(owner_path.rpartition(".")[0]))
    if device is not None and device != torch.device("cpu"):
        module.to(device)
    module.train(owner.training)
    if original is not None and not isinstance(original, CRReLU):
        # In a list, so that nn.Module does not register it: its parameters are no part of the patched model.
        module.__dict__["_original"] = [original]
    setattr(owner, attribute, module)


def _device(owner: nn.Module) -> torch.device | None:
    """Where an MLP computes: where its weights are, or where accelerate's hooks (`device_map`) bring them."""
    for module in owner.modules():
        hook: Any = module.__dict__.get("_hf_hook")
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False) and part.execution_device is not None:
                return torch.device(part.execution_device)
    reference = next(owner.parameters(), None)
    return None if reference is None else reference.device


def _calibration_text(
    model: PreTrainedModel, config: PatchConfig, tokenizer: Any, blocks: torch.Tensor | None
) -> torch.Tensor:
    from crrelu_llm.patching.calibration.text import calibration_blocks

    if blocks is not None:
        return blocks
    if tokenizer is None:
        what = f'calibration="{config.calibration}"' if config.calibration != "none" else f'density="{config.density}"'
        raise InputError(f"{what} needs the tokenizer: patch(model, ..., tokenizer=...)")
    return calibration_blocks(config.calibration_data, tokenizer, config.calibration_tokens, model.config)


def _keep_epsilon_in_float32(model: PreTrainedModel, paths: Iterable[str]) -> None:
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = strict | section.float32_names(paths)


def _report(
    model: PreTrainedModel,
    config: PatchConfig,
    sites: list[Site],
    left_alone: list[LeftAlone],
    done: dict[str, Calibrated],
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
        if site.path in done:
            entry |= asdict(done[site.path])
            entry.pop("changed_weights")
        report.sites.append(entry)
    report.skipped = [{"path": item.path, "reason": f"{item.activation}: {item.reason}"} for item in left_alone]
    return report
