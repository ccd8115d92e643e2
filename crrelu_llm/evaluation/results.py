"""An evaluation's files: one result for each model, task and what else decides it, whole or absent."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.files import plain, write_json

SETTINGS = "evaluation.json"
_WORDS = {
    "model": "other files of the model",
    "task": "other settings of the task",
    "data": "another data version",
    "dtype": "another dtype",
    "device": "another kind of device",
    "max_length": "another --max_length",
    "versions": "other versions of the libraries",
}


def result_name(model: str, task: str, key: dict[str, Any]) -> str:
    """The name of a result's file below the evaluation's directory; what decides the result is part of it.

    So a call with other settings writes beside the results that are there, and never over them.
    """
    digest = hashlib.sha256(json.dumps(plain(key), sort_keys=True).encode()).hexdigest()
    return f"results/{model}/{task}-{digest[:12]}.json"


def write_result(path: Path, key: dict[str, Any], result: dict[str, Any]) -> None:
    """Writes a result with what decides it."""
    write_json(path, {"key": key, "result": result})


def read_result(path: Path) -> dict[str, Any] | None:
    """A result that is on disk whole, or None."""
    return _read(path).get("result")


def other_result(path: Path, key: dict[str, Any]) -> str | None:
    """How the latest other result of the same model and task differs from what is asked for, in words, or None."""
    task = path.stem.rpartition("-")[0]
    others = [file for file in path.parent.glob(f"{glob.escape(task)}-*.json") if file.stem.rpartition("-")[0] == task]
    if not others:
        return None
    found, wanted = _read(max(others, key=lambda file: file.stat().st_mtime)).get("key"), plain(key)
    if not found:
        return None  # damaged: as good as none
    return " and ".join(_WORDS.get(part, part) for part in wanted if found.get(part) != wanted[part])


def read_settings(directory: Path) -> dict[str, Any]:
    """What an evaluation was asked for.

    Raises:
        InputError: The directory holds no evaluation.
    """
    settings = _read(directory / SETTINGS)
    if not settings:
        raise InputError(f"{directory}: no {SETTINGS} there, so no evaluation; give the output_dir of `crrelu eval`")
    return settings


def _read(path: Path) -> dict[str, Any]:
    """A file that we wrote; one that is damaged counts as absent."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
