"""vLLM: the plugin that lets it serve patched checkpoints, with each site's channels split among its processes.

vLLM calls `register` in every process that it starts, through the entry point `vllm.general_plugins`. This file does
not import vLLM: it changes vLLM's modules after vLLM has imported them.
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm import _transformers_hook
from crrelu_llm.activation import AFFINE, AffineModule
from crrelu_llm.compat import Private
from crrelu_llm.errors import InputError
from crrelu_llm.patching import section

_CONFIG = "vllm.config.model"
_BACKEND = "vllm.model_executor.models.transformers.base"
_ADAPTER = "vllm.lora.peft_helper"
_ATTENTION = "vllm"  # vLLM's name for its attention in transformers
# The class from which vLLM makes a decoder's class inherit, and the attribute that it then reads of each such model.
_COMPILED, _SKIPPED = "TorchCompileWithNoGuardsWrapper", "do_not_compile"
_INSTALLED, _SHARED = "_crrelu_installed", "_crrelu_shared"
RELIES_ON = (
    Private(f"{_CONFIG}:ModelConfig.verify_with_parallel_config", "refusals", takes=("parallel_config",)),
    Private(f"{_BACKEND}:Base.recursive_replace", "the channels of a site would not be shared among processes"),
    Private(f"{_BACKEND}:Base._create_hf_to_vllm_mapper", "GPT-2's weights would not be loaded"),
    Private(f"{_BACKEND}:Base.keep_in_fp32", "ε would be rounded in bfloat16 models", takes=("module",)),
    Private(f"vllm.compilation.wrapper:{_COMPILED}", "a model trained beside vLLM in one process could not be called"),
    Private(f"{_ADAPTER}:PEFTHelper.validate_legal", "the error for an adapter that trained ε", ("lora_config",)),
)


def register() -> None:
    """Does the same as `import crrelu_llm`, and changes vLLM likewise; a second call has no effect."""
    import crrelu_llm

    crrelu_llm.register()
    _transformers_hook.arrange(_install_checks, _CONFIG)
    _transformers_hook.arrange(_install_sharing, _BACKEND)
    _transformers_hook.arrange(_install_adapters, _ADAPTER)


def check(config: Any, model_impl: str, tensor_parallel_size: int) -> None:
    """Checks that vLLM can serve a model; a model that is not patched passes.

    Args:
        config: The model's config.
        model_impl: vLLM's option of this name, which selects the model code.
        tensor_parallel_size: How many processes share each layer.

    Raises:
        InputError: vLLM would compute another activation or fail half-way, or a newer crrelu_llm patched the model.
    """
    found = section.read(config)
    if found is None:
        return
    name = getattr(config, "_name_or_path", "") or "the model"
    if str(getattr(model_impl, "value", model_impl)) != "transformers":
        raise InputError(
            f"{name} is patched to {found['activation']}, which vLLM's own model code does not compute; serve it with "
            "--model-impl transformers"
        )
    experts = next((site["path"] for site in found["sites"] if site.get("kind") == "experts"), None)
    if experts is not None:
        raise InputError(
            f"{name}: vLLM runs fused experts ({experts}) with kernels that do not call the patched activation; "
            "serve this model with transformers"
        )
    if tensor_parallel_size > 1 and config.model_type == "gpt2":
        raise InputError(
            f"{name}: vLLM cannot share a gpt2 model among processes (the head counts of its attention would not "
            "match); leave --tensor-parallel-size out"
        )
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None)
    widths = sorted({site["num_channels"] for site in found["sites"]}) if plan else []
    for width in widths:
        if width % tensor_parallel_size:
            raise InputError(
                f"{name}: its MLPs have {width} channels, which --tensor-parallel-size {tensor_parallel_size} does "
                "not divide; choose a size that does"
            )


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Allocates the buffers of each activation and sets their start values; vLLM does so only for parameters."""
    for module in model.modules():
        if isinstance(module, AffineModule):
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in names:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            module.reset_parameters(names)


def share(model: nn.Module, rank: int, size: int) -> None:
    """Reduces each activation to the channels of its MLP in this process, and loads only these channels.

    Args:
        model: A model whose linear layers are already vLLM's.
        rank: The number of this process.
        size: The number of processes.
    """
    for path, module in model.named_modules():
        if not isinstance(module, AffineModule) or _SHARED in module.__dict__:
            continue
        channels = max(tensor.numel() for tensor in module.state_dict().values() if tensor.dim() == 1)
        if channels > 1 and _is_shared(model.get_submodule(path.rpartition(".")[0]), channels):
            _narrow(module, channels, rank, size)


def _is_shared(owner: nn.Module, channels: int) -> bool:
    """Whether each linear layer around an activation holds only a part of the channels."""
    for child in owner.children():
        if getattr(child, "tp_size", 1) > 1:
            taken = getattr(child, "input_is_parallel", False) and child.input_size == channels
            given = getattr(child, "gather_output", True) is False and child.output_size in (channels, 2 * channels)
            if taken or given:
                return True
    return False


def _narrow(module: AffineModule, channels: int, rank: int, size: int) -> None:
    width, rest = divmod(channels, size)
    if rest:
        raise InputError(f"CRReLU: {channels} channels cannot be shared equally among {size} processes")
    for name in ("epsilon", *AFFINE):
        whole = getattr(module, name, None)
        if whole is None or whole.shape != (channels,):
            continue
        part: Tensor = whole.detach().narrow(0, rank * width, width).clone()
        if isinstance(whole, nn.Parameter):
            part = nn.Parameter(part, whole.requires_grad)
        part.weight_loader = functools.partial(_load_part, channels, rank * width)  # type: ignore[attr-defined]
        setattr(module, name, part)
    if getattr(module, "num_channels", None) is not None:
        module.num_channels = width
    module.__dict__[_SHARED] = True


def _load_part(channels: int, start: int, part: Tensor, loaded: Tensor) -> None:
    if loaded.shape != (channels,):
        raise InputError(f"CRReLU: the checkpoint has numbers of shape {tuple(loaded.shape)}, not ({channels},)")
    part.data.copy_(loaded.narrow(0, start, len(part)))


def leave_alone(model: nn.Module) -> None:
    """Disables vLLM's compilation for a model that was built before vLLM started in the same process.

    vLLM's transformers backend changes the decoder's class itself, so that every model of that class checks whether it
    is compiled, even a model in training (TRL's `vllm_mode: colocate`).
    """
    for module in model.modules():
        if _COMPILED in [base.__name__ for base in type(module).__mro__] and not hasattr(module, _SKIPPED):
            module.__dict__[_SKIPPED] = True


def _install_checks() -> None:
    _wrap(sys.modules[_CONFIG].ModelConfig, "verify_with_parallel_config", _checking)


def _install_sharing() -> None:
    base = sys.modules[_BACKEND].Base
    _wrap(base, "__init__", _sharing)
    _wrap(base, "_create_hf_to_vllm_mapper", _expecting)


def _install_adapters() -> None:
    _wrap(sys.modules[_ADAPTER].PEFTHelper, "validate_legal", _explaining)


def _wrap(cls: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(cls, name)
    if not hasattr(original, _INSTALLED):
        wrapped = functools.wraps(original)(made(original))
        setattr(wrapped, _INSTALLED, True)
        setattr(cls, name, wrapped)


def _checking(verify: Callable[..., None]) -> Callable[..., None]:
    def check_then_verify(self: Any, parallel_config: Any) -> None:
        check(self.hf_config, self.model_impl, parallel_config.tensor_parallel_size)
        verify(self, parallel_config)

    return check_then_verify


def _sharing(build: Callable[..., None]) -> Callable[..., None]:
    def build_then_share(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if section.read(self.config) is None:
            return
        _shape_attention()
        materialise(self.model, self.device_config.device)
        if self.tp_group.world_size > 1:
            share(self.model, self.tp_group.rank_in_group, self.tp_group.world_size)

    return build_then_share


def _shape_attention() -> None:
    """Makes vLLM's attention return the shape that GPT-2 expects, with a batch dimension and a head dimension."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[_ATTENTION]
    if hasattr(attend, _INSTALLED):
        return

    @functools.wraps(attend)
    def attend_then_shape(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = attend(module, query, *args, **kwargs)
        if type(module).__name__ == "GPT2Attention":
            output = output.view(query.shape[0], query.shape[2], query.shape[1], -1)
        return output, weights

    setattr(attend_then_shape, _INSTALLED, True)
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend_then_shape)


def _expecting(make: Callable[..., None]) -> Callable[..., None]:
    def make_with_all_expected(self: Any) -> None:
        # vLLM drops every weight whose name contains such a pattern: GPT-2's `attn.bias`, meant for an old buffer,
        # also matches c_attn.bias.
        if section.read(self.config) is not None and self.model._keys_to_ignore_on_load_unexpected:
            names = list(self.model.state_dict())
            self.model._keys_to_ignore_on_load_unexpected = [
                pattern
                for pattern in self.model._keys_to_ignore_on_load_unexpected
                if not any(re.search(pattern, name) for name in names)
            ]
        make(self)

    return make_with_all_expected


def _explaining(validate: Callable[..., None]) -> Callable[..., None]:
    def explain_then_validate(self: Any, lora_config: Any) -> None:
        if any(name.rpartition(".")[0].endswith("mlp") for name in self.modules_to_save or ()):
            raise InputError(
                f"the adapter trained the activations too ({self.modules_to_save[0]}), but vLLM does not load "
                "modules_to_save; merge the adapter into the checkpoint (PEFT's merge_and_unload) and serve that"
            )
        validate(self, lora_config)

    return explain_then_validate
