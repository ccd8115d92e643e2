"""Runs a function once a module of transformers has been imported, so that our own import can stay light."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

MODELS = "transformers.modeling_utils"


def arrange(register: Callable[[], None], target: str = MODELS) -> None:
    """Calls `register` now if the module `target` is loaded, else right after its import."""
    if target in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder(register, target))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, lets the ordinary finders load it, and steps aside for good."""

    def __init__(self, register: Callable[[], None], target: str):
        self.register = register
        self.target = target

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.register)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]):
        self.loader = loader
        self.register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register()

    def __getattr__(self, name: str) -> object:
        # inspect and importlib.resources ask the loader for sources and resources
        return getattr(self.loader, name)
