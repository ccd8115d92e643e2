"""Objects of a JSON document as dataclasses: written as they were given, and checked where they are read."""

import functools
import json
import types
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Self, Union, dataclass_transform, get_args, get_origin, get_type_hints

from crrelu_llm.errors import InputError

_WORDS: dict[Any, str] = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object",
    types.NoneType: "null",
}  # fmt: skip
_LONGEST = 40  # of a wrong value that is shown
_hints = functools.cache(get_type_hints)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Record:
    """An object of a JSON document; its subclasses are dataclasses, frozen, with keywords only.

    A field with a default may be left out of the document: it is written if it was given.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __new__(cls, **given: Any) -> Self:
        record = super().__new__(cls)
        vars(record)["_given"] = given.keys()
        return record

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given, in the order of the class."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name in vars(self)["_given"]}

    def but(self, **others: Any) -> Self:
        """A copy in which some fields are others."""
        return type(self)(**self.given | others)

    def as_dict(self) -> dict[str, Any]:
        """As the document has it."""
        return {name: _written(value) for name, value in self.given.items()}

    @classmethod
    def of(cls, value: Any, place: str = "") -> Self:
        """The record that a JSON value is.

        Raises:
            InputError: A field is missing, unknown or of another type; the message begins with its `place`.
        """
        if not isinstance(value, dict):
            raise _wrong(value, "an object", place)
        known, prefix = _fields(cls), f"{place}." if place else ""
        for name in value.keys() - known.keys():
            raise InputError(f"{prefix}{name}: no such field")
        for name, (_, required) in known.items():
            if required and name not in value:
                raise InputError(f"{prefix}{name}: missing")
        return cls(**{name: _read(known[name][0], inner, f"{prefix}{name}") for name, inner in value.items()})


def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field, and whether it must be there."""
    hints = _hints(cls)
    return {one.name: (hints[one.name], one.default is one.default_factory is MISSING) for one in fields(cls)}


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


def _written(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _written(inner) for key, inner in value.items()}
    return [_written(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as the type that an annotation names."""
    origin, inner = _parts(kind)
    if origin in (Union, types.UnionType):
        chosen = next((one for one in inner if _is(value, one)), None)
        if chosen is None:
            raise _wrong(value, " or ".join(_WORDS[get_origin(one) or one] for one in inner), place)
        return _read(chosen, value, place)
    if not _is(value, kind):
        words = f"one of {', '.join(inner)}" if origin is Literal else _WORDS.get(origin or kind, "an object")
        raise _wrong(value, words, place)
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.of(value, place)
    if origin is list and inner[0] is not Any:
        return [_read(inner[0], entry, f"{place}[{index}]") for index, entry in enumerate(value)]
    if origin is dict and inner[1] is not Any:
        return {key: _read(inner[1], entry, f"{place}.{key}") for key, entry in value.items()}
    return value


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, what is within it aside."""
    origin = _parts(kind)[0] or kind
    if origin is Any or origin is Literal:
        return origin is Any or value in get_args(kind)
    if issubclass(origin, Record):
        return isinstance(value, dict)
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    return isinstance(value, int | float if origin is float else origin)


def _wrong(value: Any, wanted: str, place: str) -> InputError:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
    return InputError(f"{place + ': ' if place else ''}{shown} is not {wanted}")
