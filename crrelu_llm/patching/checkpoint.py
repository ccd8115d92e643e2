"""Reads and writes patched checkpoints: MODEL names, the hook into transformers, files that are whole or absent."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.files import remove, sync, writing
from crrelu_llm.patching import guard, section
from crrelu_llm.patching.activations import build_activation, is_ours, reset_activation
from crrelu_llm.patching.modules import fused, hidden
from crrelu_llm.patching.modules.replace import swap_in

logger = logging.getLogger("crrelu_llm")


def resolve(model: str) -> str:
    """A MODEL as the user writes it, checked: `builtin:nano` becomes its directory.

    Raises:
        InputError: A path that does not exist, or a directory without a config.json.
    """
    if model.startswith("builtin:"):
        from crrelu_llm.assets import nano_path

        if model != "builtin:nano":
            raise InputError(f"unknown model {model}; the built-in one is builtin:nano")
        return str(nano_path())
    path = Path(model).expanduser()
    if is_gguf(model):
        if not path.is_file():
            raise InputError(f"no such file: {model}")
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = " (an adapter: give the model it belongs to)" if (path / "adapter_config.json").is_file() else ""
            raise InputError(f"{model}: no config.json in this directory{hint}")
        return str(path)
    if path.exists():
        raise InputError(f"{model}: a model is a hub name, a directory or a .gguf file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"no such directory: {model}")
    return model


def is_gguf(model: str) -> bool:
    """Whether a MODEL is a GGUF file."""
    return model.endswith(".gguf")


def load_config(model: str, **kwargs: Any) -> Any:
    """The config of a MODEL; nothing else is read."""
    from transformers import AutoConfig

    return _load(AutoConfig, model, **kwargs)


def load_tokenizer(model: str, **kwargs: Any) -> Any:
    """The tokenizer of a MODEL."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model, **kwargs)


def load_model(model: str, dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """A MODEL with its weights, in evaluation mode; a GGUF file is dequantised."""
    from transformers import AutoModelForCausalLM

    if is_gguf(model):
        from transformers import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    return _load(AutoModelForCausalLM, model, dtype=dtype, **kwargs)


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Within it, `from_pretrained` gives this process the whole model, though training shards it.

    Under ZeRO-3 it would split the parameters over all processes, and wait for them; under FSDP it would leave all but
    the main process of a host without weights.
    """
    from transformers.integrations import deepspeed as hf_deepspeed

    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


def skeleton(model: str, **kwargs: Any) -> Any:
    """A MODEL on the meta device: every module, no weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(model, **kwargs)
    with torch.device("meta"), loading_whole():
        try:
            return AutoModelForCausalLM.from_config(config, **kwargs)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{model}: {config.model_type} has no causal language model in transformers") from error


def save(model: Any, tokenizer: Any, output_dir: str | Path, files: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint beside `output_dir` and renames it, so that what bears the name is whole.

    Args:
        files: JSON documents to put into the same directory, by file name.

    Raises:
        DiskError: The disk is full or read-only; nothing is left behind.
    """
    target = Path(output_dir).resolve()
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):  # RWKV has divided its weights to evaluate, in place
            module.train()
            module._rescale_layers()
    # transformers lets the first of all processes write alone; here each host's first one may, and whoever calls does.
    model.should_save_on_this_rank = bool
    with writing(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):
            remove(leftover)
        try:
            model.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            for name, content in (files or {}).items():
                (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
            sync(scratch)
            if target.is_dir():  # only ever an empty one: callers refuse a directory that holds something
                target.rmdir()
            os.replace(scratch, target)
        finally:
            del model.should_save_on_this_rank
            remove(scratch)


def _load(auto_class: Any, model: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` on a MODEL, with its errors in one line."""
    source = resolve(model)
    if is_gguf(source):
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise InputError("reading a .gguf file needs the gguf package: pip install 'crrelu_llm[gguf]'") from error
        directory, name = os.path.split(source)
        kwargs["gguf_file"] = name
        source = directory or "."
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{model}: cannot be loaded: {first.strip()}") from error


def install_hook() -> None:
    """Makes transformers build patched models: called once, when transformers' modeling_utils has been imported."""
    from transformers import PreTrainedModel
    from transformers.activations import ACT2FN

    if "crrelu" in ACT2FN:
        return
    ACT2FN["crrelu"] = CRReLU
    guard.install()
    post_init, initialize = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    initialize_missing = PreTrainedModel._initialize_missing_keys

    def swap_then_post_init(self: Any) -> None:
        names = _swap_from_section(self)
        post_init(self)
        self._keep_in_fp32_modules_strict.update(names)

    def initialize_ours_too(self: Any, module: Any, is_custom_code: bool = False) -> None:
        # The families' own _init_weights do not know our modules: a parameter that the checkpoint lacks would stay
        # whatever torch.empty gave.
        if is_ours(module) and not getattr(module, "_is_hf_initialized", False):
            reset_activation(module, _missing(module))
            module._is_hf_initialized = True
        else:
            initialize(self, module, is_custom_code)

    def warn_then_initialize_missing(self: Any, is_quantized: bool) -> None:
        _check_swapped(self)
        _warn_of_missing(self)
        initialize_missing(self, is_quantized)

    PreTrainedModel.post_init = swap_then_post_init  # type: ignore[method-assign]
    PreTrainedModel._initialize_weights = initialize_ours_too  # type: ignore[method-assign]
    PreTrainedModel._initialize_missing_keys = warn_then_initialize_missing  # type: ignore[method-assign]


def _swap_from_section(model: Any) -> set[str]:
    """Swaps the sites that the config names; returns the parameter names that must stay float32."""
    from transformers.activations import ACT2CLS

    found = section.read(model.config)
    if found is None:
        return set()
    names = set()
    for site in found["sites"]:
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
                found["activation"],
                site["num_channels"],
                found["epsilon_per"],
                found["epsilon_init"],
                section.is_fitted(found),
            )
            module.__dict__["_swapped"] = True
            # What the model has just built is the original only where no config key was changed.
            swap_in(model, path, module, None if site["original"] in ACT2CLS else current)
        if found["activation"] == "crrelu":
            fused.fuse(model, [path], found.get("recompute_activation", False))
            names |= section.float32_names([path])
    return names


def _check_swapped(model: Any) -> None:
    found = section.read(model.config)
    for site in found["sites"] if found else ():
        path = section.local_path(model, site["path"])
        # A head on the base model, or another class of the same family, keeps the base model under its prefix.
        if path is None:
            raise InputError(
                f"{model.config._name_or_path}: config.json names the site {site['path']}, "
                f"which {type(model).__name__} does not have; load it with the class it was saved from"
            )


def _warn_of_missing(model: Any) -> None:
    sites: dict[tuple[str, float], list[str]] = {}
    for path, module in model.named_modules():
        for name in _missing(module) if isinstance(module, CRReLU) else ():
            if not getattr(module, name).is_meta:  # device_map leaves it on the disk; a missing one never is there
                sites.setdefault((name, module.start_values[name]), []).append(path)
    for (name, start), paths in sites.items():
        logger.warning(
            "%s: the checkpoint has no %s for %d of its sites (first: %s); they start at %g",
            model.config._name_or_path,
            name,
            len(paths),
            paths[0],
            start,
        )


def _missing(module: Any) -> list[str]:
    """Names of an activation's parameters and buffers that no checkpoint gave a value."""
    tensors = module.state_dict(keep_vars=True)
    return [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
