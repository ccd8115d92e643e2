"""TRL's trainers with a learnable ε: one mixin for all of them."""

from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from crrelu_llm.activation import AffineModule
from crrelu_llm.compat.accelerate import sharding
from crrelu_llm.errors import InputError, reason_of
from crrelu_llm.patching import guard, section
from crrelu_llm.patching.blend import Blend
from crrelu_llm.patching.modules import fused
from crrelu_llm.secrets import hidden
from crrelu_llm.training.activation_l1 import ActivationL1Mixin
from crrelu_llm.training.activation_section import ActivationArguments
from crrelu_llm.training.blending import BlendCallback, blend_of
from crrelu_llm.training.callbacks import PER_SITE, EpsilonLearns, quieten
from crrelu_llm.training.dynamic_density import DensityCallback, density_means
from crrelu_llm.training.optimizer import (
    affine_modules,
    check_learnable,
    epsilon_modules,
    freeze,
    split_off_affine,
    split_off_epsilon,
    train_affine,
)
from crrelu_llm.training.processes import (
    check_launch,
    prepare_fsdp2,
    refuse_16_bit_zero3,
    shard_fsdp2,
    whole_values,
)


class EpsilonMixin(ActivationL1Mixin):
    """Adds a learnable ε to a Trainer: in float32, with its own parameter group, and logged.

    Does the same, without logs, for scale, shift, gain and offset if they are trained. Also adds the other features of
    the activation section: the gradual swap, the tracked density and the L1 term.
    """

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any
    state: Any
    blend: Blend | None = None

    def __init__(self, *args: Any, activation_args: ActivationArguments, **kwargs: Any):
        self.activation_args = activation_args
        super().__init__(*args, **kwargs)
        check_launch(self.accelerator)
        guard.check(self.model)
        restore_float32(self.model)
        patched = section.read(self.model.config)
        if patched is not None and not hasattr(self.model, "peft_config"):
            patched["weights_changed"] = True  # training fits the weights to the new activation
        if activation_args.recompute_activation:  # not set in the config of an already patched checkpoint
            recompute_activation(self.model)
        if activation_args.epsilon_learning_rate == 0:
            for module in epsilon_modules(self.model).values():
                freeze(self.model, module, "epsilon")
        if activation_args.affine_learning_rate > 0:
            # Only in the trained model: in a reference, or with the adapter disabled, the four stay buffers. Done
            # after TRL's QLoRA has cast the trained parameters to bfloat16.
            refuse_16_bit_zero3(self.accelerator, self.model)
            train_affine(self.model)
        ours = [] if patched is None else section.crrelu_paths(patched)
        if ours and activation_args.epsilon_learning_rate > 0:
            check_learnable(self.model, ours)
            self.add_callback(EpsilonLearns(self))  # type: ignore[attr-defined]
        quieten(self)
        self.install_blend()
        if self.blend is not None:
            callback = BlendCallback(self.blend, activation_args.blend_steps, activation_args.blend_schedule)
            self.add_callback(callback)  # type: ignore[attr-defined]
        if activation_args.density_update_steps and ours:
            tracking = DensityCallback(activation_args.density_update_steps, activation_args.density_momentum)
            self.add_callback(tracking)  # type: ignore[attr-defined]
        self.install_activation_l1()  # last: its hooks see the outputs of the others' hooks

    def install_blend(self) -> None:
        """Installs the blend if the recipe sets blend_steps and the model is patched; a second call has no effect."""
        patched = section.read(self.model.config)
        if self.blend is None and self.activation_args.blend_steps and patched is not None:
            self.blend = blend_of(self.model, patched)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own method, with FSDP2's units and dtypes set for ε and for the loss."""
        prepare_fsdp2(self.accelerator, self.model)
        with sharding(shard_fsdp2):
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own optimiser, with ε and, if trained, the four moved into their own groups."""
        if self.optimizer is None:
            super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
            model = args[0] if args and args[0] is not None else kwargs.get("model") or self.model
            rates = self.activation_args
            split_off_epsilon(self.optimizer, model, rates.epsilon_learning_rate, rates.epsilon_weight_decay)
            split_off_affine(self.optimizer, model, rates.affine_learning_rate)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trainer's own method, which every process calls; saves ε and the trained scale, shift, gain and offset
        with the optimiser's float32 values.

        DeepSpeed gathers the 16-bit weights of mixed precision, in which ε would lose its last small updates.
        """
        if self.accelerator.distributed_type == "DEEPSPEED":
            modules = affine_modules(self.model).values()
            ours = {id(value) for module in modules for value in module.parameters(recurse=False)}
            named = {name: p for name, p in self.model.named_parameters() if id(p) in ours}
            exact = whole_values(named)
            if state_dict is not None:  # in the main process
                state_dict |= {name: value for name, value in exact.items() if name in state_dict}
        with hidden(self.args):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own method; a failure of the first step is reported as wrong input (model, rows or recipe)."""
        if self.state.global_step:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            why = f"the first step failed: {reason_of(error)}"
            raise InputError(f"{why}; does plain TRL train this model with this recipe?") from error

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs also the ε of every site (the mean of a per-channel ε), the λ of a blend and a tracked density."""
        if "loss" in logs:
            if self.blend is not None:
                logs["blend"] = self.blend.weight
            means = epsilon_means(self.model)
            if means:
                logs["epsilon_mean"] = sum(means.values()) / len(means)
                logs.update({PER_SITE + path: value for path, value in means.items()})
            if self.activation_args.density_update_steps and (density := density_means(self.model)) is not None:
                logs["density/center"], logs["density/width"] = density
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def epsilon_means(model: Any) -> dict[str, float]:
    """The mean of ε by the path of the site; if ε is sharded, every process must call this function."""
    values = whole_values({path: module.epsilon for path, module in epsilon_modules(model).items()})
    return {path: value.mean().item() for path, value in values.items()}


def recompute_activation(model: Any) -> None:
    """Makes every CRReLU of a patched model recompute its output in the backward pass; other models do not change."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = section.read(base.config)
    if found is not None and (ours := section.crrelu_paths(found)):
        paths = [section.local_path(base, path) for path in ours]
        fused.fuse(base, [path for path in paths if path is not None], recompute=True)
        found["recompute_activation"] = True


def restore_float32(model: Any) -> None:
    """Restores ε and the trained four to float32, with their exact values, after a library has cast the trained
    parameters (TRL, QLoRA).

    ZeRO-3 needs one dtype for all parameters, and keeps their float32 values in the optimiser.
    """
    if is_deepspeed_zero3_enabled():
        return
    originals = {
        name.removesuffix(".original_module"): module
        for name, module in model.named_modules()
        if name.endswith(".original_module") and isinstance(module, AffineModule)
    }
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False) if isinstance(module, AffineModule) else ():
            if value.dtype != torch.float32:
                exact = getattr(originals.get(name.split(".modules_to_save.")[0], module), key)
                value.data = exact.detach().float().clone()
