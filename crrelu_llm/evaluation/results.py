"""An evaluation's files: one result for each model, task and what else decides it, whole or absent."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.files import plain, write_json

SETTINGS = "evaluation.json"
MODEL = "model"  # stands among the tasks for the model itself
_WORDS = {
    "model": "other files of the model",
    "task": "other settings of the task",
    "data": "another data version",
    "dtype": "another dtype",
    "device": "another kind of device",
    "max_length": "another --max_length",
    "versions": "other versions of the libraries",
}
# What the report reads, by type.
_MODEL_SHAPE = {"activation": str, "parameters": int, "epsilon": dict}
_TASK_SHAPE = {
    **dict.fromkeys(("metrics", "items", "higher_is_better", "groups", "intervals"), dict),
    **dict.fromkeys(("examples", "per_token", "notes"), list),
    "seconds": int | float,
}
_EXAMPLE_SHAPE = {"group": str, "prompt": str, "options": list, "target": str, "responses": list}
_SETTINGS_SHAPE = {
    **dict.fromkeys(("models", "tokenizers", "results", "failures", "environment"), dict),
    **dict.fromkeys(("tasks", "data"), list),
    **dict.fromkeys(("suite", "baseline", "dtype", "command", "created"), str),
    **dict.fromkeys(("reference", "limit", "max_length", "batch_size", "chat_template", "beta"), object),
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
    """A result that is on disk whole, or None: one that lacks something is computed again."""
    found: Any = _read(path).get("result")
    if path.stem.rpartition("-")[0] == MODEL:
        return found if _has(found, _MODEL_SHAPE) else None
    if not _has(found, _TASK_SHAPE) or not all(_has(example, _EXAMPLE_SHAPE) for example in found["examples"]):
        return None
    count = len(found["examples"])
    columns = all(isinstance(column, list) and len(column) == count for column in found["items"].values())
    ends = all(isinstance(pair, list) and len(pair) == 2 for pair in found["intervals"].values())
    return found if count and columns and ends else None


def other_result(path: Path, key: dict[str, Any]) -> str | None:
    """How the latest other result of the same model and task differs from what is asked for, in words, or None."""
    task = path.stem.rpartition("-")[0]
    others = [file for file in path.parent.glob(f"{glob.escape(task)}-*.json") if file.stem.rpartition("-")[0] == task]
    if not others:
        return None
    found, wanted = _read(max(others, key=lambda file: file.stat().st_mtime)).get("key"), plain(key)
    if not isinstance(found, dict) or not found:
        return None  # damaged: as good as none
    return " and ".join(_WORDS.get(part, part) for part in wanted if found.get(part) != wanted[part])


def read_settings(directory: Path) -> dict[str, Any]:
    """What an evaluation was asked for.

    Raises:
        InputError: The directory holds no evaluation, or what it holds is damaged.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(f"{directory}: no {SETTINGS} there, so no evaluation; give the output_dir of `crrelu eval`")
    settings = _read(path)
    if not _are_settings(settings):
        raise InputError(
            f"{path}: damaged, or of another version of crrelu_llm; run the same `crrelu eval` again, which keeps the "
            "results that are there"
        )
    return settings


def _are_settings(settings: dict[str, Any]) -> bool:
    if not _has(settings, _SETTINGS_SHAPE) or not settings["models"]:
        return False
    models, wanted = settings["models"], {MODEL, *map(str, settings["tasks"])}
    return (
        settings["baseline"] in models
        and settings["reference"] in (None, *models)
        and models.keys() == settings["tokenizers"].keys() == settings["results"].keys()
        and all(isinstance(names, dict) and wanted <= names.keys() for names in settings["results"].values())
        and all(isinstance(name, str) for names in settings["results"].values() for name in names.values())
        and all(isinstance(tasks, dict) for tasks in settings["failures"].values())
        and all(_has(entry, {"name": str, "rows": int, "sha256": str}) for entry in settings["data"])
    )


def _has(found: Any, shape: dict[str, Any]) -> bool:
    """Whether it is a mapping with these keys, each of its type."""
    return isinstance(found, dict) and all(
        key in found and isinstance(found[key], wanted) for key, wanted in shape.items()
    )


def _read(path: Path) -> dict[str, Any]:
    """A file that we wrote; one that is damaged counts as absent."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
