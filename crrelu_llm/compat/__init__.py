"""The private parts of other libraries that we use: one small file per library, each with a list.

A release may change these parts without notice. `tests/compat/` checks the lists and says what breaks; `crrelu env`
names the parts that the installed releases lack.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "lm_eval", "vllm")


@dataclass(frozen=True)
class Private:
    """A private part of a library.

    Attributes:
        name: `module:attribute`, with a dotted attribute in a class.
        breaks: What would not work if it were gone or changed.
        takes: Names of parameters that it must have.
        called_by: `module:attribute` of the function that looks it up by name, where a replacement takes effect.
        optional: Whether it may be missing, as in older releases.
    """

    name: str
    breaks: str
    takes: tuple[str, ...] = ()
    called_by: str | None = None
    optional: bool = False

    def problem(self) -> str | None:
        """What is wrong with it in the installed release, in one line; None if it is as expected."""
        try:
            found = _find(self.name)
        except (ImportError, AttributeError) as error:
            return None if self.optional else f"{self.name} is gone ({error}): {self.breaks}"
        if self.takes:
            parameters = inspect.signature(found).parameters
            lacking = [name for name in self.takes if name not in parameters]
            if lacking:
                return f"{self.name} takes no {', '.join(lacking)}: {self.breaks}"
        if self.called_by is not None and self.name.rpartition(":")[2].split(".")[-1] not in _names(self.called_by):
            return f"{self.called_by} does not call {self.name}: {self.breaks}"
        return None


def problems(libraries: tuple[str, ...] = LIBRARIES) -> list[str]:
    """The missing or changed private parts in the installed releases of these libraries, one line each.

    A library that is not installed is skipped.
    """
    found = []
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        relied_on = importlib.import_module(f"crrelu_llm.compat.{library}").RELIES_ON
        found += [problem for part in relied_on if (problem := part.problem()) is not None]
    return found


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _names(caller: str) -> set[str]:
    """Every name that a function looks up, including its inner functions."""
    code = [inspect.unwrap(_find(caller)).__code__]
    names: set[str] = set()
    while code:
        one = code.pop()
        names |= set(one.co_names)
        code += [constant for constant in one.co_consts if inspect.iscode(constant)]
    return names
