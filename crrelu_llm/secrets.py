"""What of a recipe and of a command line may be published: no tokens, no values that nobody vouches for."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "…"
# Options that are secrets by themselves; never written.
_SECRETS = ("hub_token", "push_to_hub_token")
# Keys of nested maps (`model_init_kwargs`, `datasets`, …) whose texts may be shown; numbers always are. Of `env` the
# names of its variables are, alone.
_SHOWN = frozenset(
    (
        *("dtype", "torch_dtype", "attn_implementation", "revision", "device_map", "use_safetensors"),
        *("path", "name", "data_dir", "data_files", "split", "columns"),
        *("auto_wrap_policy", "backward_prefetch", "state_dict_type", "transformer_layer_cls_to_wrap"),
    )
)
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+@")
_IN_A_QUERY = re.compile(r"([?&](?:[\w-]*(?:token|key|signature|secret|password|sig))=)[^&\s]+", re.IGNORECASE)


def publishable(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without secrets: of nested maps only what is known to be harmless, the rest as "…"."""
    return {
        key: {name: HIDDEN for name in value} if key == "env" and isinstance(value, dict) else _shown(value)
        for key, value in values.items()
        if key not in _SECRETS
    }


def publishable_map(values: dict[str, Any]) -> dict[str, Any]:
    """The same of one of its nested maps."""
    return {key: _shown(entry) if _is_harmless(key, entry) else HIDDEN for key, entry in values.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return _IN_A_QUERY.sub(rf"\1{HIDDEN}", _IN_A_URL.sub(f"{HIDDEN}@", value))
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    if isinstance(value, dict):
        return publishable_map(value)
    return value


def _is_harmless(key: str, value: Any) -> bool:
    return key in _SHOWN or isinstance(value, dict) or value is None or isinstance(value, bool | int | float)


def without_secrets(argv: list[str]) -> list[str]:
    """A command line that may be published."""
    result, hide = [], False
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        secret = argument.startswith("--") and name.replace("-", "_") in _SECRETS
        if hide:
            result.append(HIDDEN)
        elif secret and equals:
            result.append(f"--{name}={HIDDEN}")
        elif argument.startswith("--") and equals:
            result.append(f"--{name}={_text(value)}")
        else:
            result.append(_text(argument))
        hide = secret and not equals
    return result


def _text(argument: str) -> str:
    """A value of a command line; a map is written in JSON there."""
    if argument.startswith("{"):
        try:
            return json.dumps(_shown(json.loads(argument)), ensure_ascii=False)
        except ValueError:
            return HIDDEN
    return str(_shown(argument))


@contextlib.contextmanager
def hidden(args: Any) -> Iterator[None]:
    """Within it the training arguments hold no secret: the Trainer pickles them beside the model."""
    kept = {name: getattr(args, name) for name in (*_SECRETS, "model_init_kwargs") if hasattr(args, name)}
    try:
        for name, value in kept.items():
            setattr(args, name, _shown(value) if isinstance(value, dict) else None)
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
