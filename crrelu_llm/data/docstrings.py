"""The built-in corpus: Python's own documentation, as found on the machine, cut into four splits that share nothing.

Documentation strings are read out of the standard library's source with `ast`; nothing is imported or downloaded. The
language-reference topics behind `help()` (`pydoc_data.topics`) are added to the `pretrain` split.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crrelu_llm.errors import InputError

if TYPE_CHECKING:
    import datasets

SPLITS = ("pretrain", "train", "test", "calibration")
MINIMUM_CHARACTERS = 40
TOPICS = "pydoc_data"
# Upper ends of each split's share of the modules. The salt makes the texts come out near 70, 17, 6 and 7 % in every
# supported Python version; the topics, a fifth of all text, are part of the 70.
_BOUNDS = ((0.62, "pretrain"), (0.85, "train"), (0.92, "test"), (1.0, "calibration"))
_SALT = "crrelu-131"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", TOPICS}


def split_of(module: str) -> str:
    """Names the split that a module's documentation belongs to.

    The answer depends on the top-level name alone, so it is the same in every Python version, and a C module's pure
    Python twin (`_pydecimal`) goes where the module itself (`decimal`) goes.

    Args:
        module: a dotted module name.

    Returns:
        One of `SPLITS`.
    """
    top = module.partition(".")[0]
    if top == TOPICS:
        # Topics quote each other at length ("compound" contains "while"), so they must not be divided.
        return "pretrain"
    family = top.lstrip("_").removeprefix("py") or top
    digest = hashlib.sha256(f"{_SALT}:{family}".encode()).digest()
    share = int.from_bytes(digest[:2], "big") / 65536
    return next(split for bound, split in _BOUNDS if share < bound)


def load_docstrings() -> datasets.DatasetDict:
    """Builds the corpus in memory.

    The result is the same every time for one Python installation. A text that occurs more than once is kept once, in
    the split of the module that comes first in alphabetical order.

    Returns:
        The splits `pretrain`, `train`, `test` and `calibration`; rows `{"text", "module", "name"}`, where `name` is
        the full dotted name of what the text documents.

    Raises:
        InputError: if this Python comes without the source of its standard library.
    """
    import datasets

    return datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows)) for split, rows in _rows().items()})


@functools.cache  # parsing takes seconds, and a comparison asks for the corpus once a run
def _rows() -> dict[str, list[dict[str, str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for module, name, text in _documentation(root):
        key = " ".join(text.split())
        if len(text) < MINIMUM_CHARACTERS or key in seen:
            continue
        seen.add(key)
        rows[split_of(module)].append({"text": text, "module": module, "name": name})
    empty = [split for split in SPLITS if not rows[split]]
    if empty:
        raise InputError(
            f"builtin:docstrings: {root} holds too little of the standard library's source to fill the split(s) "
            f"{', '.join(empty)}; use a Python installation with its .py files, or another data set"
        )
    return rows


def _documentation(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (module, full name, cleaned text) in a fixed order."""
    for path in sorted(_sources(root)):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules are not the user's concern
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a deliberately broken example file, or one that may not be read
        for name, text in _docstrings(tree, module):
            yield module, name, text

    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"{TOPICS}.topics", f"{TOPICS}.topics.{name}", inspect.cleandoc(text)


def _sources(root: Path) -> Iterator[Path]:
    # Only names that Python itself counts as its library: distributions put files of their own beside it.
    for entry in root.iterdir():
        if entry.stem not in sys.stdlib_module_names or entry.name in _SKIPPED_FOLDERS:
            continue
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir():
            for path in entry.rglob("*.py"):
                if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
                    yield path


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)  # cleaned as by inspect.cleandoc
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(
            child, ast.If | ast.Try | ast.With
        ):  # definitions that depend on the platform; those of except clauses are stand-ins
            yield from _docstrings(child, name)
