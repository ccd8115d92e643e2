"""Builds the trainer of a recipe, for every kind."""

import contextlib
import logging
from typing import Any

import torch
from trl import get_peft_config, get_quantization_config

from crrelu_llm.compat.bitsandbytes import trainable_layers
from crrelu_llm.compat.trl import preparing_references
from crrelu_llm.errors import InputError, reading
from crrelu_llm.patching import loading, section
from crrelu_llm.secrets import publishable_map
from crrelu_llm.training import preflight
from crrelu_llm.training.arguments import Recipe
from crrelu_llm.training.distillation import load_teacher
from crrelu_llm.training.processes import prepare_fsdp2, refuse_sharded_weights, shard_fsdp2

logger = logging.getLogger("crrelu_llm")


def build_trainer(recipe: Recipe, model: str, train: Any, test: Any) -> Any:
    """Builds the trainer of a recipe, starting from the checkpoint `model` (a path or a hub name)."""
    args, options = recipe.training, recipe.model
    args.model_init_kwargs = {
        "revision": options.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": options.attn_implementation,
        "dtype": options.dtype,
        "use_safetensors": loading.needs_safetensors(model),
        **(args.model_init_kwargs or {}),
    }
    given = {"train": _rows(train), "eval": _rows(test)}
    adapting = trainable_layers() if quantises(recipe) else contextlib.nullcontext()
    # An error while TRL builds a trainer is an error in the recipe or in the data.
    with preparing_references(_sharded), adapting, reading(recipe.source):
        trainer: Any = recipe.kind.trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            quantization_config=get_quantization_config(options),
            peft_config=_peft_config(recipe, model),
            activation_args=recipe.activation,
            **recipe.kind.arguments(recipe),
        )
        if recipe.activation.distill_weight:
            refuse_sharded_weights(trainer.accelerator, f"{recipe.source}: distill_weight")
            teacher = load_teacher(recipe, model, get_quantization_config(options), trainer.accelerator.device)
            trainer.learn_from(teacher, recipe.activation.distill_weight)
    # All models are loaded, so access tokens are no longer needed, and trackers would record them.
    args.model_init_kwargs = publishable_map(args.model_init_kwargs)
    if recipe.kind.check_rows is None:
        preflight.check_prepared(trainer, recipe, given)
    preflight.try_saving(trainer, recipe)
    if recipe.script.ignore_bias_buffers:  # the workaround for DDP that TRL's own scripts have
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def _rows(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _peft_config(recipe: Recipe, model: str) -> Any:
    """TRL's own adapter configuration, with the exact paths of the sites: ε is trained and saved in the adapter.

    The same holds for scale, shift, gain and offset of any activation if they are trained, and for a tracked density:
    DPO's reference, the model without its adapter, keeps its original density.
    """
    config: Any = get_peft_config(recipe.model)
    if config is None:
        return None
    about = loading.load_config(model, **recipe.loading)
    if recipe.kind.auto_class == loading.CLASSIFIER and config.task_type == "CAUSAL_LM":
        config.task_type = "SEQ_CLS"  # PEFT then trains the head and saves it with the adapter
        logger.warning("lora_task_type is SEQ_CLS, so that the adapter has the head of the reward model")
    found = section.read(about)
    if found is None:
        return config
    asked = recipe.activation
    learns = asked.epsilon_learning_rate > 0 or asked.density_update_steps > 0
    trains_affine = asked.affine_learning_rate > 0 and section.is_calibrated(found)
    paths = [site["path"] for site in found["sites"]] if trains_affine else section.crrelu_paths(found)
    if trains_affine or (learns and paths):
        own = config.modules_to_save or []
        # A module that the user trains whole includes its ε.
        paths = [
            path for path in paths if not any(above.endswith(name) for above in _with_owners(path) for name in own)
        ]
        config.modules_to_save = [*own, *paths]
    return config


def _with_owners(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _sharded(model: Any, accelerator: Any) -> Any:
    """DPO's reference, sharded under FSDP2 as Accelerate shards the trained model, one unit per layer.

    TRL would make one unit of it, so that every GPU holds the whole reference during its forward pass; TRL does not
    change a model that is already sharded.
    """
    model.requires_grad_(False)  # FSDP2 needs one dtype only for trainable parameters, and ε is float32
    prepare_fsdp2(accelerator, model)
    return shard_fsdp2(accelerator, model) if accelerator.is_fsdp2 else model


def quantises(recipe: Recipe) -> bool:
    """Whether a recipe loads the model in 4 or 8 bits."""
    return bool(recipe.model.load_in_4bit or recipe.model.load_in_8bit)


def require_bitsandbytes(recipe: Recipe) -> None:
    """Raises InputError where a recipe quantises and bitsandbytes is missing."""
    if quantises(recipe):
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{recipe.source}: load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes"
            ) from error
