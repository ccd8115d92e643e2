"""Identifies a model or a data set: by its files with their sizes and times, or by the commit on the hub."""

import hashlib
from pathlib import Path
from typing import Any

from crrelu_llm.patching import loading

# Files that do not change what a model computes.
_REPORTS = {"patch_report.json", "patch_origin.json", "run.json", "trainer_state.json", "training_args.bin"}
_PART, _PARTS = 1 << 16, 128  # bytes of a large file that are hashed
_SUFFIXES = {".md", ".html", ".png", ".lock", ".tmp"}


def of_model(model: str, revision: str | None = None, **options: Any) -> dict[str, Any]:
    """Identifies a MODEL: a local one by its files, one on the hub by its commit.

    Raises:
        InputError: The model does not exist.
    """
    source = loading.resolve(model)
    path = Path(source)
    if path.exists():
        return {"files": files_of(path)}
    config = loading.load_config(source, **({"revision": revision} if revision else {}), **options)
    return {"hub": source, "revision": revision, "commit": getattr(config, "_commit_hash", None)}


def files_of(path: Path) -> list[list[Any]]:
    """Name, size and time (ns) of a model file, or of each file in a model directory that affects the computation."""
    files = [path] if path.is_file() else sorted([*path.iterdir(), *path.glob("additional_chat_templates/*")])
    files = [file for file in files if file.is_file() and file.suffix not in _SUFFIXES and file.name not in _REPORTS]
    names = [file.name if path.is_file() else str(file.relative_to(path)) for file in files]
    return [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in zip(names, files, strict=True)]


def of_data(name: str) -> list[list[Any]]:
    """Name, size and time of a local data file, or of all files in a folder; empty for a hub name or `builtin:`."""
    path = Path(name).expanduser()
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = [(file.relative_to(path) if path.is_dir() else Path(file.name), file.stat()) for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in found]


def digests_of(path: Path) -> dict[str, str]:
    """A fast hash of each of a model's files, by name; only samples of a large file are hashed."""
    return {name: _digest(path if path.is_file() else path / name) for name, *_ in files_of(path)}


def _digest(file: Path) -> str:
    size, found = file.stat().st_size, hashlib.sha256()
    starts = [0] if size <= _PARTS * _PART else [index * (size - _PART) // (_PARTS - 1) for index in range(_PARTS)]
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            found.update(opened.read(_PARTS * _PART if len(starts) == 1 else _PART))
    return found.hexdigest()[:16]


def without_times(origin: dict[str, Any]) -> dict[str, Any]:
    """An origin without file times and our version, so that copied files with the same content compare as equal."""
    files = {key: [entry[:2] for entry in origin.get(key) or []] for key in ("files", "data")}
    return {key: value for key, value in origin.items() if key != "crrelu_llm"} | files


def changed(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The differences between two origins of a patched copy: the names of files and of keys."""
    names = []
    for key in sorted(wanted.keys() | found.keys()):
        mine, its = wanted.get(key), found.get(key)
        if mine == its:
            continue
        if key in ("files", "data") and isinstance(mine, list) and isinstance(its, list):
            names += sorted({str(entry[0]) for entry in mine + its if entry not in mine or entry not in its})
        elif isinstance(mine, dict) and isinstance(its, dict):
            names += changed(mine, its)
        else:
            names.append("the version of crrelu_llm" if key == "crrelu_llm" else key)
    return list(dict.fromkeys(names))
