"""The model of a job without its weights: every tensor has a shape and a device, but no contents."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crrelu_llm.activation import AffineModule
from crrelu_llm.compat.transformers import checkpoint_activations
from crrelu_llm.errors import InputError
from crrelu_llm.patching import section
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.patch import assigned
from crrelu_llm.patching.sites import survey
from crrelu_llm.planning.job import NATIVE, Job
from crrelu_llm.training.optimizer import train_affine

# bitsandbytes' NF4: half a byte per weight, and a scale per 64 weights. The recipes quantise the scales too
# (`use_bnb_nested_quant`): one byte each, and a float32 per 256 scales.
_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
_DROPOUT = 0.05  # TRL's default for adapters; the dropout mask is stored for the backward pass


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, including ε; tied parameters count once.

    Attributes:
        total: All parameters, including adapters.
        trainable: Trained parameters.
        adapters: Parameters added by LoRA (including the trained copies of ε).
        quantised: Parameters that 4-bit loading stores in 4 bits.
        epsilon: Parameters of ε.
        unit: Parameters of the largest transformer layer, the unit that FSDP2 gathers.
        unit_trainable: Trained parameters of this unit.
        tail: Parameters of the FSDP2 unit that stays gathered: final norm and LM head (with a tied embedding).
        tail_trainable: Trained parameters of this unit.
        embedding: Parameters of an embedding that is not tied to the head.
        largest: Parameters of the largest linear layer.
        buffer_bytes: Bytes of the calibrated buffers inside the activations that are not trained; never sharded.
    """

    total: int
    trainable: int
    adapters: int
    quantised: int
    epsilon: int
    unit: int
    unit_trainable: int
    tail: int
    tail_trainable: int
    embedding: int
    largest: int
    buffer_bytes: int


def prepared_config(config: Any, job: Job) -> Any:
    """A copy of a model's config that builds the patched model of the job.

    Raises:
        InputError: The model has no causal LM, no sites, or is patched to another activation.
    """
    config = copy.deepcopy(config)
    if not job.use_cpu:  # GPU attention kernels include dropout; a CPU would use one that stores all
        for key in ("attn_pdrop", "attention_dropout"):
            if getattr(config.get_text_config(), key, None):
                setattr(config.get_text_config(), key, 0.0)
    found = section.read(config)
    if found is not None:
        if job.activation not in (NATIVE, found["activation"]):
            raise InputError(f"the model is already patched to {found['activation']}; leave --activation out")
        found["recompute_activation"] = job.recompute_activation or found.get("recompute_activation", False)
        return config
    if job.activation == NATIVE:
        return config
    patch = PatchConfig(
        job.activation,
        epsilon_per=job.epsilon_per,
        calibration=job.calibration,
        recompute_activation=job.recompute_activation,
    )
    sites = survey(_from_config(config))[0]
    activations = assigned(sites, patch)
    section.write(config, patch, [site for site in sites if site.path in activations], {}, activations=activations)
    return config


def build(config: Any, job: Job, dtype: torch.dtype) -> Any:
    """The model to train, in training mode, with adapters; on the meta device."""
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    model = _from_config(config, job.kind.auto_class, dtype=dtype)
    model.config.use_cache = False
    if model.get_output_embeddings() is not None:
        more = ("mean_logits",) if job.kind.reference else ()
        outputs = ("log_probs", "entropy", "is_top1", *more)  # as in TRL
        add_fused_lm_head(model, outputs=outputs)
    if job.use_peft:
        model = _with_adapters(model, job)
    if job.affine_learning_rate > 0:
        train_affine(model)
    model.train()
    if getattr(job.kind.config, "disable_dropout", False):
        disable_dropout_in_model(model)
    if job.gradient_checkpointing:
        if job.use_peft:
            model.enable_input_require_grads()
        try:
            checkpoint_activations(base_model(model))
        except ValueError as error:  # as in training
            raise InputError(f"{error} Add --gradient_checkpointing false") from error
    return model


def reference(config: Any, dtype: torch.dtype) -> Any:
    """The reference model, in evaluation mode; on the meta device."""
    from trl.trainer.utils import add_fused_lm_head

    model = _from_config(config, dtype=dtype)
    model.config.use_cache = False
    add_fused_lm_head(model)
    return model.eval().requires_grad_(False)


def give_fake_tensors(model: nn.Module) -> None:
    """Replaces every parameter and buffer by a fake CPU tensor, and keeps ties; call it in a FakeTensorMode.

    Modules are first built on the meta device, which more libraries support than fake tensors.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def base_model(model: Any) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _from_config(config: Any, auto_class: str = "AutoModelForCausalLM", **kwargs: Any) -> Any:
    import transformers

    if auto_class.endswith("SequenceClassification"):
        config = copy.deepcopy(config)
        config.num_labels, config.get_text_config().pad_token_id = 1, 0
    try:
        with torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config, **kwargs)
    except InputError:
        raise
    except ValueError as error:
        what = "causal language model" if auto_class.endswith("CausalLM") else "sequence classifier"
        raise InputError(f"{config.model_type} has no {what} in transformers") from error


def _with_adapters(model: Any, job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    found = section.read(model.config)
    affine = found is not None and job.affine_learning_rate > 0 and section.is_calibrated(found)
    every = [site["path"] for site in found["sites"]] if found else []
    sites = (every if affine else section.crrelu_paths(found) if found else []) or None
    adapters = LoraConfig(
        r=job.lora_r, target_modules="all-linear", lora_dropout=_DROPOUT, modules_to_save=sites, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapters)
    if job.load_in_4bit:  # TRL casts QLoRA's trained parameters to bfloat16; our trainer keeps ε in float32
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(".epsilon"):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def count(model: Any, job: Job) -> Counts:
    """Counts the parameters of a built model."""
    base = base_model(model)
    layer_classes = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in layer_classes]
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    in_layers = {id(entry) for layer in layers for entry in layer.parameters()}
    rest = {id(entry): entry for entry in base.parameters() if id(entry) not in in_layers}
    untied = head is not None and embedding is not None and head.weight is not embedding.weight
    embeddings = {id(entry) for entry in embedding.parameters()} if untied else set()
    tail = [entry for key, entry in rest.items() if key not in embeddings]
    largest_layer = max(layers, key=_size, default=None)
    linear = [module for name, module in base.named_modules() if _is_quantised(name, module, head)]
    names = dict(model.named_parameters())
    return Counts(
        total=_size(model),
        trainable=_trainable(model.parameters()),
        adapters=sum(p.numel() for name, p in names.items() if ".lora_" in name or ".modules_to_save." in name),
        quantised=sum(module.weight.numel() for module in linear) if job.load_in_4bit else 0,
        epsilon=sum(
            p.numel() for name, p in names.items() if name.endswith("epsilon") and "original_module" not in name
        ),
        unit=_size(largest_layer) if largest_layer is not None else 0,
        unit_trainable=_trainable(largest_layer.parameters()) if largest_layer is not None else 0,
        tail=sum(entry.numel() for entry in tail),
        tail_trainable=_trainable(tail),
        embedding=sum(rest[key].numel() for key in embeddings),
        largest=max((module.weight.numel() for module in linear), default=0),
        buffer_bytes=sum(
            buffer.nbytes
            for module in model.modules()
            if isinstance(module, AffineModule)
            for buffer in module.buffers(recurse=False)
        ),
    )


def _size(module: nn.Module) -> int:
    return sum(entry.numel() for entry in module.parameters())


def _trainable(parameters: Any) -> int:
    return sum(entry.numel() for entry in parameters if entry.requires_grad)


def _is_quantised(name: str, module: nn.Module, head: Any) -> bool:
    """Whether bitsandbytes replaces a module: linear layers (and GPT-2's Conv1D), but not the head or adapters."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in f".{name}"


def weight_bytes(counts: Counts, job: Job) -> float:
    """Bytes of the loaded weights, including adapters and the activations' buffers."""
    each = getattr(torch, job.dtype).itemsize
    adapters = counts.adapters * (2 if job.load_in_4bit else 4)  # PEFT keeps adapters in float32, TRL's QLoRA in bf16
    base = counts.total - counts.adapters
    quantised = counts.quantised * _BYTES_4BIT
    return (base - counts.quantised) * each + quantised + adapters + counts.buffer_bytes
