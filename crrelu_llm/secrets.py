"""The parts of a recipe and of a command line that may be published: no tokens, and no values not known to be safe."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "…"
# Options that are secrets; never written.
_SECRETS = ("hub_token", "push_to_hub_token")
# Keys of nested maps (`model_init_kwargs`, `datasets`, …) whose text values may be shown; numbers always are. For
# `env` only the names of the variables are shown.
_SHOWN = frozenset(
    (
        *("dtype", "torch_dtype", "attn_implementation", "revision", "device_map", "use_safetensors"),
        *("path", "name", "data_dir", "data_files", "split", "columns"),
        *("model_type", "architecture", "hidden_act"),
        *("auto_wrap_policy", "backward_prefetch", "state_dict_type", "transformer_layer_cls_to_wrap"),
    )
)
_TOKEN = re.compile(r"token|key|secret|password", re.IGNORECASE)
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+@")
_IN_A_QUERY = re.compile(r"([?&](?:[\w-]*(?:token|key|signature|secret|password|sig))=)[^&\s]+", re.IGNORECASE)


def publishable(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without secrets: in nested maps only values known to be harmless, the others as "…"."""
    return {
        key: {name: HIDDEN for name in value} if key == "env" and isinstance(value, dict) else _shown(value)
        for key, value in values.items()
        if key not in _SECRETS
    }


def publishable_map(values: dict[str, Any]) -> dict[str, Any]:
    """One nested map of a recipe without secrets, as in `publishable`."""
    return {key: _shown(entry, key in _SHOWN) if _is_harmless(key, entry) else HIDDEN for key, entry in values.items()}


def _shown(value: Any, texts: bool = True) -> Any:
    """A value, with its text values hidden unless `texts` is set."""
    if isinstance(value, str):
        if not texts:
            return HIDDEN
        if value.lstrip().startswith("{"):  # a map as text
            try:
                return json.dumps(publishable_map(json.loads(value)), ensure_ascii=False)
            except (ValueError, AttributeError):
                return HIDDEN
        return _IN_A_QUERY.sub(rf"\1{HIDDEN}", _IN_A_URL.sub(f"{HIDDEN}@", value))
    if isinstance(value, list):
        return [_shown(entry, texts) for entry in value]
    if isinstance(value, dict):
        return publishable_map(value) if texts else {key: _shown(entry, False) for key, entry in value.items()}
    return value


def _is_harmless(key: str, value: Any) -> bool:
    return key in _SHOWN or isinstance(value, dict) or value is None or isinstance(value, bool | int | float)


def without_secrets(argv: list[str]) -> list[str]:
    """A command line without secrets."""
    result, hide = [], False
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        secret = argument.startswith("--") and name.replace("-", "_") in _SECRETS
        if hide:
            result.append(HIDDEN)
        elif secret and equals:
            result.append(f"--{name}={HIDDEN}")
        elif argument.startswith("--") and equals:
            result.append(f"--{name}={_shown(value)}")
        else:
            result.append(str(_shown(argument)))
        hide = secret and not equals
    return result


def hidden_part(values: dict[str, Any]) -> str | None:
    """A hash of the values that `publishable` hides, except access tokens; None if it hides nothing.

    Two recipes with different hashes differ, although their published values may be equal.
    """
    shown = publishable(values)
    left = {key: _without_tokens(value) for key, value in values.items() if key in shown and shown[key] != value}
    if not left:
        return None
    return hashlib.sha256(json.dumps(left, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_tokens(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tokens(entry) for key, entry in value.items() if not _TOKEN.search(str(key))}
    return value


@contextlib.contextmanager
def hidden(args: Any) -> Iterator[None]:
    """A context in which the training arguments hold no secret: the Trainer pickles them beside the model."""
    kept = {name: getattr(args, name) for name in (*_SECRETS, "model_init_kwargs") if hasattr(args, name)}
    try:
        for name, value in kept.items():
            setattr(args, name, publishable_map(value) if isinstance(value, dict) else None)
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
