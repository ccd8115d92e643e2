"""What we use of other libraries beyond their public interface: one small file a library, each with the list of it.

A release may change any of it without notice. `tests/compat/` holds the lists and says what breaks; `crrelu env` names
what the installed releases lack.
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
        name: `module:attribute`, the attribute dotted where it is in a class.
        breaks: What would not work if it were gone or did something else.
        takes: Names of parameters that it must have.
        called_by: `module:attribute` of what looks it up by its name; replacing it does something only there.
        optional: Whether older releases lack it, and we then do without.
    """

    name: str
    breaks: str
    takes: tuple[str, ...] = ()
    called_by: str | None = None
    optional: bool = False

    def problem(self) -> str | None:
        """What is wrong with it in the installed release, in one line; None where it is as we know it."""
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
    """What the installed releases of these libraries lack of all that we rely on, a line each.

    A library that is not installed is left out.
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
    """Every name that a function looks up, in the functions within it too."""
    code = [inspect.unwrap(_find(caller)).__code__]
    names: set[str] = set()
    while code:
        one = code.pop()
        names |= set(one.co_names)
        code += [constant for constant in one.co_consts if inspect.iscode(constant)]
    return names
