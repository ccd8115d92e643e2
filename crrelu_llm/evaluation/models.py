"""The models of an evaluation: `name=path`, the identity of their files, and loading with or without an adapter."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.results import LoadedModel
from crrelu_llm.evaluation.suites import is_name
from crrelu_llm.patching import fingerprint, loading, section

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class NamedModel:
    """A model with a name.

    Attributes:
        name: The name in results and for `--baseline`, also the name of a directory.
        path: A hub name, the directory of a checkpoint or of an adapter, a `.gguf` file, or `builtin:nano`.
    """

    name: str
    path: str

    @property
    def base(self) -> str:
        """The path of the base model of an adapter; the own path of any other model.

        Raises:
            InputError: The adapter does not name its base model.
        """
        found = _adapter(self.path)
        if found is None:
            return self.path
        base = str(found.get("base_model_name_or_path") or "")
        if not base:
            raise InputError(f"{self.path}: {_ADAPTER} does not name the base model of the adapter")
        beside = Path(self.path).expanduser() / "patched"  # the patched model of a run whose directory was moved
        moved = Path(base).is_absolute() and Path(base).name == "patched" and not Path(base).exists()
        return str(beside) if moved and (beside / "config.json").is_file() else base

    @property
    def is_adapter(self) -> bool:
        """Whether the path is a directory with an adapter."""
        return _adapter(self.path) is not None


def parse_models(texts: list[str]) -> list[NamedModel]:
    """Parses `name=path`; the default name is the last part of the path.

    Raises:
        InputError: A path is missing, a name cannot be the name of a directory, or two names are equal.
    """
    models = []
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text.removeprefix("builtin:")).name.removesuffix(".gguf"), text
        if not path or not is_name(name) or name.startswith("."):
            raise InputError(
                f"--models {text}: write name=path, such as native=models/base; a name is one line without a slash"
            )
        models.append(NamedModel(name, path))
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--models: two models are called {twice}; rename one: {twice}=PATH other=PATH")
    return models


def identity(model: NamedModel) -> dict[str, Any]:
    """The identity of a model: the names, sizes and times of its files, or its commit on the hub.

    Raises:
        InputError: The model does not exist.
    """
    if model.is_adapter:
        return {"adapter": fingerprint.files_of(Path(model.path)), "base": fingerprint.of_model(model.base)}
    return fingerprint.of_model(model.path)


def load_tokenizer(model: NamedModel) -> Any:
    """The tokenizer of a model: an adapter's own if it has one, otherwise that of the base model.

    Raises:
        InputError: The tokenizer cannot be loaded, or returns no tokens for a text.
    """
    own = model.is_adapter and (Path(model.path) / "tokenizer_config.json").is_file()
    if not own:
        return loading.load_tokenizer(model.base)
    from transformers import AutoTokenizer

    with reading(f"{model.path}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model.path)
    loading.require_tokens(tokenizer, model.path)
    return tokenizer


def require_weights(model: NamedModel) -> None:
    """Checks that the weight files of a local model exist and have readable headers, before the long work.

    Raises:
        InputError: The model has no weights, lacks one of its files, or has a truncated one.
    """
    if model.is_adapter:
        require_weights(NamedModel(model.name, model.base))
        directory = Path(model.path).expanduser()
    else:
        directory = Path(loading.resolve(model.path))
    if not directory.is_dir():  # a single file, or a model on the hub
        return
    files = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    if not files:
        raise InputError(f"{model.path}: no weights there (*.safetensors); copy or save the model again")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        absent = sorted(_shards(index) - {file.name for file in files})
        if absent:
            raise InputError(f"{model.path}: {index.name} names {absent[0]}, which is not there; copy it there")
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: cannot be read ({reason}); copy or save the model again") from None


def require_adapter(model: NamedModel) -> None:
    """Raises InputError if PEFT does not accept the configuration of an adapter."""
    if model.is_adapter:
        from peft import PeftConfig

        with reading(f"{model.path}: {_ADAPTER}", "save the adapter again"):
            config: Any = PeftConfig.from_pretrained(model.path)
            if not isinstance(getattr(config, "r", 1), int):
                raise ValueError(f"r is {config.r!r}, which is not a whole number")


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: damaged; copy or save the model again") from None


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of the tokenizer's rules; tokenizers with equal hashes split every text in the same way."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are settings of a call, not rules of the tokenizer.
    content = (
        json.loads(backend.to_str()) | {"padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    )
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(model: NamedModel, dtype: str = "float32") -> Any:
    """Loads a model, with its adapter if it is one, in evaluation mode.

    Args:
        dtype: The name of the torch dtype to load in; `"auto"` is the dtype of the checkpoint.

    Raises:
        InputError: The model cannot be loaded, or the adapter does not fit its base model.
    """
    import torch

    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    loaded = loading.load_model(model.base, dtype=kind)
    if model.is_adapter:
        from peft import PeftModel

        from crrelu_llm.activation import AFFINE

        _extend_embeddings(loaded, Path(model.path).expanduser())
        try:
            loaded = PeftModel.from_pretrained(loaded, model.path)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, KeyError) and reason.strip("'").endswith(tuple(f".{name}" for name in AFFINE)):
                reason = "the model's activations are calibrated, but those that the adapter was trained with are not"
            raise InputError(f"{model.path}: the adapter cannot be loaded on top of {model.base}: {reason}") from error
    return loaded.eval()


def _extend_embeddings(model: Any, adapter: Path) -> None:
    """Extends the embeddings of a model to their size in the adapter's training: a cloned chat template adds tokens.

    The adapter holds the values of the new rows.
    """
    embeddings = model.get_input_embeddings().weight
    found = (_adapter(str(adapter)) or {}).get("trainable_token_indices") or []
    lists = found.values() if isinstance(found, dict) else [found]
    rows = max([embeddings.shape[0], *(index + 1 for indices in lists for index in indices)])
    heads = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if any(module is head for head in heads)
    }
    for file in adapter.glob("adapter_model*.safetensors"):
        with safe_open(file, "pt") as saved:
            for key in saved.keys():  # noqa: SIM118 — not a dictionary
                parts = key.split(".")
                if parts[-1] == "weight" and parts[-2] in names:
                    rows = max(rows, saved.get_slice(key).get_shape()[0])
    if rows > embeddings.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def describe_model(model: Any, path: str) -> LoadedModel:
    """The facts about a model that was loaded from `path`."""
    from crrelu_llm.activation import CRReLU

    found = section.read(model.config)
    native = getattr(model.config, "hidden_act", None) or getattr(model.config, "activation_function", None)
    return LoadedModel(
        activation=found["activation"] if found else str(native or "native"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        epsilon={
            name.removeprefix("base_model.model."): module.epsilon.detach().float().mean().item()
            for name, module in model.named_modules()
            if isinstance(module, CRReLU)
        },
        path=path,
    )


def _adapter(path: str) -> dict[str, Any] | None:
    file = Path(path).expanduser() / _ADAPTER
    if path.startswith("builtin:") or not file.is_file() or any(file.parent.glob("model*.safetensors")):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); save the adapter again") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: must hold an object; save the adapter again")
    return found
