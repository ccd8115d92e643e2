"""The built-in corpus: the documentation of the installed Python, in four disjoint splits.

Docstrings are read from the standard library's source with `ast`; nothing is imported or downloaded. The
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
# Upper end of each split's share of the modules. With this salt the splits have about 70, 17, 6 and 7 % of the text in
# every supported Python version; the topics, a fifth of all text, are part of the 70.
_BOUNDS = ((0.62, "pretrain"), (0.85, "train"), (0.92, "test"), (1.0, "calibration"))
_SALT = "crrelu-131"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", TOPICS}


def split_of(module: str) -> str:
    """Names the split of a module's documentation.

    The split depends only on the top-level name, so it is the same in every Python version, and the pure Python twin
    of a C module (`_pydecimal`) has the same split as the module itself (`decimal`).

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

    The result is always the same for one Python installation. A repeated text is kept once, in the split of the
    alphabetically first module.

    Returns:
        The splits `pretrain`, `train`, `test` and `calibration`; rows `{"text", "module", "name"}`, where `name` is
        the full dotted name of the documented object.

    Raises:
        InputError: if this Python lacks the source of its standard library.
    """
    import datasets

    return datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows)) for split, rows in _rows().items()})


@functools.cache  # parsing takes seconds, and every run of a comparison needs the corpus
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
                warnings.simplefilter("ignore")  # invalid escapes in old modules do not matter to the user
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a deliberately broken example file, or an unreadable file
        for name, text in _docstrings(tree, module):
            yield module, name, text

    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"{TOPICS}.topics", f"{TOPICS}.topics.{name}", inspect.cleandoc(text)


def _sources(root: Path) -> Iterator[Path]:
    # Only the names that Python lists as its library: distributions add their own files beside it.
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
        ):  # platform-dependent definitions; those in except clauses are stand-ins
            yield from _docstrings(child, name)
