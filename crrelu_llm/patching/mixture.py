"""A mixture, one activation per layer: the text `0-5=relu,6-=crrelu`, allowed wherever an activation is named."""

import re
from collections.abc import Mapping
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.patching.activations import activation_names

_RANGE = re.compile(r"\d+(-\d*)?")


def is_mixture(activation: str) -> bool:
    """Whether an activation is a mixture."""
    return isinstance(activation, str) and "=" in activation


def text_of(activation: Any) -> Any:
    """Turns a recipe's mapping of layers to names, `{0-5: relu, 6-: crrelu}`, into the text; else no change."""
    if not isinstance(activation, Mapping):
        return activation
    return ",".join(f"{layers}={name}" for layers, name in activation.items())


def names_of(activation: str) -> list[str]:
    """The distinct names in a mixture, or the one plain name."""
    return list(dict.fromkeys(name for _, name in _parts(activation))) if is_mixture(activation) else [activation]


def check(activation: Any) -> None:
    """Raises InputError for unknown names, impossible layers, and layers with two activations."""
    known = activation_names()
    if not isinstance(activation, str):
        raise InputError(f"unknown activation {activation!r}; choose one of {', '.join(known)}")
    for name in names_of(activation):
        if name not in known:
            raise InputError(f"unknown activation {name!r}; choose one of {', '.join(known)}")
    if not is_mixture(activation):
        return
    ends: list[tuple[int, float, str]] = []
    for layers, _ in _parts(activation):
        first, last = _ends(layers, float("inf"))
        if last < first:
            raise InputError(f"activation: {layers} names no layer")
        for other, end, text in ends:
            if first <= end and other <= last:
                raise InputError(f"activation: layer {max(first, other)} has two, by {text} and by {layers}")
        ends.append((first, last, layers))


def by_layer(activation: str, count: int) -> dict[int, str]:
    """The activation of each named layer, in a model with `count` layers.

    Raises:
        InputError: The model lacks a named layer.
    """
    found: dict[int, str] = {}
    for layers, name in _parts(activation):
        first, last = _ends(layers, count - 1)
        if max(first, last) >= count:
            raise InputError(f"activation: {layers}={name}: the model has {count} layers, 0 to {count - 1}")
        found |= dict.fromkeys(range(first, int(last) + 1), name)
    return dict(sorted(found.items()))


def in_words(activation: str) -> str:
    """The mixture in words."""
    if not is_mixture(activation):
        return activation
    return ", ".join(f"{name} in layers {layers}" for layers, name in _parts(activation))


def _parts(text: str) -> list[tuple[str, str]]:
    """Pairs of layers (a number or a range) and the name of their activation."""
    found, waiting = [], []
    for piece in text.split(","):
        layers, equals, name = (part.strip() for part in piece.partition("="))
        waiting.append(layers)
        if not _RANGE.fullmatch(layers) or (equals and not name):
            break
        if equals:
            found += [(entry, name) for entry in waiting]
            waiting = []
    if waiting:
        raise InputError(f"activation: write layers and their activations as 0-5=relu,6-=crrelu, not {text!r}")
    return found


def _ends(layers: str, open_end: float) -> tuple[int, float]:
    first, dash, last = layers.partition("-")
    return int(first), int(last) if last else open_end if dash else int(first)
