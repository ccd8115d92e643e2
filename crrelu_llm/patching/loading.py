"""Loads and saves models: resolves MODEL names, loads whole weights in each process, saves atomically."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.compat.transformers import dequantising, loading_whole, saving_here
from crrelu_llm.errors import InputError, reading, reason_of
from crrelu_llm.files import replacing, writing

CAUSAL_LM, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
IMAGE_CLASSIFIER = "AutoModelForImageClassification"
# The name of each class of models, and the Hub's name of its task.
HEADS = {CAUSAL_LM: "a language model", CLASSIFIER: "a sequence classifier", IMAGE_CLASSIFIER: "an image classifier"}
TASKS = {CAUSAL_LM: "text-generation", CLASSIFIER: "text-classification", IMAGE_CLASSIFIER: "image-classification"}


def resolve(model: str) -> str:
    """Checks a MODEL as the user writes it; `builtin:nano` becomes its directory.

    Raises:
        InputError: The path does not exist, or is a directory without a config.json.
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
            hint = " (an adapter: give its base model)" if (path / "adapter_config.json").is_file() else ""
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
    """The config of a MODEL; reads nothing else."""
    from transformers import AutoConfig

    return _load(AutoConfig, model, **kwargs)


def load_tokenizer(model: str, **kwargs: Any) -> Any:
    """The tokenizer of a MODEL."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, **kwargs)
    require_tokens(tokenizer, model)
    return tokenizer


def load_processor(model: str, **kwargs: Any) -> Any:
    """The image processor of a MODEL, which turns an image into pixels of the model's input size."""
    # Imported from its module: without torchvision, older releases export a placeholder, although they do not need it.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return _load(AutoImageProcessor, model, **kwargs)


def require_tokens(tokenizer: Any, name: str) -> None:
    """Raises InputError if a tokenizer returns no tokens, as transformers' does for a directory without one."""
    with reading(f"{name}: its tokenizer cannot be used", "put the model's tokenizer files there"):
        made = tokenizer("a word", add_special_tokens=False)["input_ids"]
    if not made:
        raise InputError(
            f"{name}: its tokenizer returns no tokens for a text; put the model's tokenizer files there "
            "(tokenizer.json, tokenizer_config.json)"
        )


def load_model(model: str, dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """A MODEL with its weights and its own head, in evaluation mode; a GGUF file is dequantised."""
    import transformers

    head = CAUSAL_LM
    if is_gguf(model):
        kwargs |= dequantising()
    else:
        kwargs.setdefault("use_safetensors", needs_safetensors(model))
        about = {key: kwargs[key] for key in ("revision", "trust_remote_code") if kwargs.get(key)}
        head = head_of(load_config(model, **about))
    return _load(getattr(transformers, head), model, dtype=dtype, **kwargs)


def head_of(config: Any) -> str:
    """The auto class of a config or its dict: for sequence classifiers (reward models, for example), for image
    classifiers, else for causal LMs. A model of images alone counts as an image classifier, even without a head."""
    from transformers.models.auto import modeling_auto as auto

    values = config if isinstance(config, dict) else vars(config) | {"model_type": getattr(config, "model_type", "")}
    names = values.get("architectures") or ()
    if any(name.endswith("ForSequenceClassification") for name in names):
        return CLASSIFIER
    kind = values.get("model_type", "")
    only_images = kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    only_images = only_images and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = any("ForImageClassification" in name for name in names)
    return IMAGE_CLASSIFIER if named or only_images else CAUSAL_LM


def needs_safetensors(model: str) -> bool | None:
    """Whether a MODEL must be loaded from safetensors: True for the hub and for directories with safetensors.

    torch's weights-only unpickler reads a local directory of `.bin` files; it runs no code from them.
    """
    path = Path(resolve(model))
    own = path.is_dir() and any(path.glob("pytorch_model*.bin")) and not any(path.glob("model*.safetensors"))
    return None if own else True


def skeleton(model: str, revision: str | None = None, auto_class: str | None = None, **kwargs: Any) -> Any:
    """A MODEL on the meta device: every module, no weights; `kwargs` are passed to `from_config`.

    Args:
        model: A MODEL as the user writes it.
        revision: Revision on the hub.
        auto_class: transformers' auto class that builds it; by default the class for the model's own head.
    """
    import transformers

    code = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
    config = load_config(model, **code, **({"revision": revision} if revision else {}))
    remedy = "check its config.json and the options"
    with torch.device("meta"), loading_whole(), reading(f"{model}: no model can be built from its config", remedy):
        try:
            return getattr(transformers, auto_class or head_of(config)).from_config(config, **kwargs)
        except ImportError as error:
            raise InputError(f"{model}: {without_timm(error)}") from error
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            what = HEADS[auto_class or head_of(config)].partition(" ")[2].replace("language", "causal language")
            raise InputError(f"{model}: {config.model_type} has no {what} in transformers") from error


def save(
    model: Any,
    tokenizer: Any,
    output_dir: str | Path,
    files: dict[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint beside `output_dir` and renames it, so that a directory with that name is complete.

    Args:
        files: JSON documents to write into the same directory, by file name.
        finish: Called with the directory before it is renamed.

    Raises:
        DiskError: The disk is full or read-only; nothing is left behind.
    """
    target = Path(output_dir).resolve()
    with writing(str(target)), saving_here(model), replacing(target) as scratch:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        for name, content in (files or {}).items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        if finish is not None:
            finish(scratch)


def _load(auto_class: Any, model: str, **kwargs: Any) -> Any:
    """Calls `auto_class.from_pretrained` on a MODEL, and reports its errors in one line."""
    source = resolve(model)
    if is_gguf(source):
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise InputError("reading a .gguf file needs the gguf package: pip install gguf") from error
        directory, name = os.path.split(source)
        kwargs["gguf_file"] = name
        source = directory or "."
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None would prompt the user and wait
    with reading(f"{model}: cannot be loaded", "check its files and its config.json"):
        try:
            return auto_class.from_pretrained(source, **kwargs)
        except ImportError as error:
            raise InputError(f"{model}: {without_timm(error)}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise InputError(
                f"{model}: cannot be loaded: the shapes of its weights do not match its config.json; its files do "
                "not belong together"
            ) from error


def without_timm(error: ImportError) -> str:
    """The message of an ImportError in one line; for timm's models, says what to install."""
    said = f"{error} {error.name or ''}"
    if "timm" in said or "torchvision" in said:
        return "a timm model needs timm and the torchvision that matches torch: pip install timm torchvision"
    return reason_of(error)


def require_saving(model: Any, name: str) -> None:
    """Raises InputError if transformers refuses to save the model's generation config."""
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        with reading(f"{name}: generation_config.json could not be saved again", "mend it, or remove the file"):
            model.generation_config.validate(strict=True)


def require_embeddings(tokenizer: Any, rows: int | None, name: str) -> None:
    """Refuses a tokenizer with tokens for which the model has no embedding.

    The padding token needs no embedding: its positions are masked.

    Args:
        tokenizer: The tokenizer.
        rows: How many embeddings the model has; None if unknown.
        name: The name of the model, for the message.

    Raises:
        InputError: A token other than padding has no embedding.
    """
    if rows is None:
        return
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if beyond - {tokenizer.pad_token}:
        raise InputError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, but the model has embeddings for only {rows}; put "
            "the model's own tokenizer there"
        )
