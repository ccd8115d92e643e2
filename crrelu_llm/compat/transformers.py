"""transformers: the building, loading and saving of models, and the parts of the Trainer that ours replaces."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crrelu_llm.compat import Private

_MODEL = "transformers.modeling_utils:PreTrainedModel"
_TRAINER = "transformers.trainer:Trainer"
RELIES_ON = (
    Private(f"{_MODEL}.post_init", "a patched checkpoint would load with its original activation"),
    Private(
        f"{_MODEL}._initialize_weights",
        "an ε missing from the checkpoint would have a random value",
        takes=("module",),
    ),
    Private(
        f"{_MODEL}._initialize_missing_keys",
        "there would be no warning that a checkpoint lacks ε",
        takes=("is_quantized",),
        called_by=f"{_MODEL}._finalize_model_loading",
    ),
    Private(
        f"{_MODEL}._adjust_missing_and_unexpected_keys",
        "calibrated weights under a plain config would load silently",
        takes=("loading_info",),
        called_by=f"{_MODEL}._finalize_model_loading",
    ),
    Private(f"{_MODEL}._keep_in_fp32_modules_strict", "a bfloat16 load would round ε"),
    Private("transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref", "calibration under ZeRO-3"),
    Private("transformers.integrations.deepspeed:unset_hf_deepspeed_config", "calibration under ZeRO-3"),
    Private("transformers.integrations.liger:apply_liger_kernel", "Liger would replace the swapped MLPs silently"),
    Private("transformers:GgufConfig", "GGUF files where `gguf_file` alone does not dequantise", optional=True),
    Private(f"{_TRAINER}.create_optimizer", "ε would decay and learn at the common rate"),
    Private(f"{_TRAINER}._save", "ε in 16 bits under DeepSpeed", takes=("output_dir", "state_dict")),
    Private(f"{_TRAINER}._save_checkpoint", "checkpoints that are whole or absent", takes=("model", "trial")),
    Private(
        f"{_TRAINER}._get_output_dir",
        "checkpoints that are whole or absent",
        takes=("trial",),
        called_by=f"{_TRAINER}._save_checkpoint",
    ),
    Private(f"{_TRAINER}._push_from_checkpoint", "a half-written checkpoint would be pushed to the hub"),
    Private(f"{_TRAINER}._load_from_checkpoint", "the error of a resume", takes=("resume_from_checkpoint", "model")),
    Private(f"{_TRAINER}._load_best_model", "the best checkpoint, if its weights have other names"),
    Private(f"{_TRAINER}._get_train_sampler", "the augmentation of an image in an epoch", takes=("train_dataset",)),
    Private(f"{_TRAINER}._run_epoch", "a resume after the last step would train one more step"),
    Private(f"{_TRAINER}._prepare_for_training", "FSDP2: the units of ε"),
    Private(f"{_TRAINER}._prepare_inputs", "losses by item", takes=("inputs",)),
)


def extend(
    swap: Callable[[Any], set[str]],
    initialise: Callable[[Any], bool],
    before_initialising: Callable[[Any], None],
    before_adjusting: Callable[[Any, Any], None],
    after_saving: Callable[[Any, Path], None],
) -> None:
    """Extends how transformers builds, loads and saves every model.

    Args:
        swap: Changes a model that has just been built; returns the names of the tensors that must stay float32.
        initialise: Sets the start values of a module without values in the checkpoint; returns whether it is ours.
        before_initialising: Called with a model before values missing from the checkpoint are initialised.
        before_adjusting: Called with a model and the names that the checkpoint has but the model lacks.
        after_saving: Called with a model and the directory in which the main process has saved it.
    """
    from transformers import PreTrainedModel

    post_init, initialize = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    initialize_missing = PreTrainedModel._initialize_missing_keys
    adjust_keys = PreTrainedModel._adjust_missing_and_unexpected_keys

    @functools.wraps(post_init)
    def swap_then_post_init(self: Any) -> None:
        names = swap(self)
        post_init(self)
        if names:
            self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | names
            # Zamba ties whole layers, but each site has its own numbers, and buffers cannot be tied.
            tied = self.all_tied_weights_keys
            self.all_tied_weights_keys = {name: tied[name] for name in tied if not name.endswith(tuple(names))}

    @functools.wraps(initialize)
    def initialize_ours_too(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        # The families' own _init_weights do not know our modules: a parameter missing from the checkpoint would keep
        # the arbitrary values of torch.empty.
        if not initialise(module):
            initialize(self, module, *args, **kwargs)

    @functools.wraps(initialize_missing)
    def warn_then_initialize_missing(self: Any, *args: Any, **kwargs: Any) -> None:
        before_initialising(self)
        initialize_missing(self, *args, **kwargs)

    @functools.wraps(adjust_keys)
    def refuse_then_adjust_keys(self: Any, loading_info: Any, *args: Any, **kwargs: Any) -> None:
        before_adjusting(self, loading_info.unexpected_keys)
        adjust_keys(self, loading_info, *args, **kwargs)

    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_then_complete(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        result = save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            after_saving(self, Path(save_directory))
        return result

    PreTrainedModel.save_pretrained = save_then_complete  # type: ignore[method-assign]
    PreTrainedModel.post_init = swap_then_post_init  # type: ignore[method-assign]
    PreTrainedModel._initialize_weights = initialize_ours_too  # type: ignore[method-assign]
    PreTrainedModel._initialize_missing_keys = warn_then_initialize_missing  # type: ignore[method-assign]
    PreTrainedModel._adjust_missing_and_unexpected_keys = refuse_then_adjust_keys  # type: ignore[method-assign]


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """A context in which `from_pretrained` gives this process the whole model, even if training shards it.

    Otherwise ZeRO-3 would split the parameters over all processes and wait for them, and FSDP would load weights only
    in the main process of a host.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


@contextlib.contextmanager
def saving_here(model: Any) -> Iterator[None]:
    """A context in which `save_pretrained` writes in any process that calls it, and writes the computed weights.

    By default only the first process writes. transformers also reverts the conversions that it made on loading, which
    is impossible for a checkpoint that was already quantised. And RWKV rescales its weights in place for evaluation.
    """

    def reverts(conversion: Any) -> bool:
        try:
            conversion.reverse_transform()
        except NotImplementedError:
            return False
        return True

    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            module.train()
            module._rescale_layers()
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = [entry for entry in model._weight_conversions if reverts(entry)]
    model.should_save_on_this_rank = bool
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def checkpoint_activations(model: Any) -> None:
    """Turns gradient checkpointing on, as the Trainer does."""
    # Older releases have only the older name; newer ones warn of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def dequantising() -> dict[str, Any]:
    """The options of `from_pretrained` that dequantise a GGUF file."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases do nothing else
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
