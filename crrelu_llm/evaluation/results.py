"""The files of an evaluation: its settings, and the results of models and tasks."""

import contextlib
import glob
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.measured import Measured
from crrelu_llm.files import plain, write_json
from crrelu_llm.records import Record
from crrelu_llm.report.schema import Data, Values

SETTINGS = "evaluation.json"
MODEL = "model"  # the name among the tasks that stands for the model itself
_WORDS = {
    "model": "other files of the model",
    "task": "other settings of the task",
    "data": "another data version",
    "dtype": "another dtype",
    "device": "another kind of device",
    "max_length": "another --max_length",
    "versions": "other versions of the libraries",
}
_WRONG = (
    "damaged, or of another version of crrelu_llm; run the same `crrelu eval` again, which keeps the existing results"
)
_R = TypeVar("_R", bound=Record)


class Settings(Record):
    """evaluation.json: what was asked for, and the names of the result files by model and task.

    Attributes:
        models: The path of each model, by its name.
        tokenizers: The identity of each model's tokenizer (`models.tokenizer_identity`).
        failures: The error of each failed task, by model and task.
    """

    models: dict[str, str]
    tasks: list[str]
    suite: str
    baseline: str
    reference: str | None
    beta: float
    limit: int | None
    chat_template: bool
    dtype: str
    batch_size: int | str
    max_length: int | None
    device: str
    command: str
    tokenizers: dict[str, str]
    results: dict[str, dict[str, str]]
    data: list[Data]
    environment: dict[str, Any]
    failures: dict[str, dict[str, str]]
    created: str


class Key(Record):
    """Everything that affects the numbers of a result; without a task, of the result about the model itself.

    Attributes:
        model: The identity of the model's files (`models.identity`).
        device: The kind of device.
        versions: The versions of the libraries that may change a number.
        max_length: The longest context in tokens, if the user has set one.
        task: The configuration of the task.
    """

    model: dict[str, Any]
    dtype: str
    device: str
    versions: dict[str, str]
    max_length: int | None = None
    task: dict[str, Any] | None = None
    data: list[Data] | None = None


class Result(Measured):
    """The result file of a task: the measurements and their cost."""

    seconds: float
    peak_memory_bytes: int | None = None


class LoadedModel(Record):
    """The result file of a model; `epsilon` is the mean ε of each CRReLU site."""

    activation: str
    parameters: int
    epsilon: Values
    path: str


def result_name(model: str, task: str, key: Key) -> str:
    """The path of a result file within the evaluation's directory.

    The name contains a hash of the key: an evaluation with other settings writes new files beside the existing ones.
    """
    digest = hashlib.sha256(json.dumps(plain(key.as_dict()), sort_keys=True).encode()).hexdigest()
    return f"results/{model}/{task}-{digest[:12]}.json"


def write_result(path: Path, key: Key, result: Result | LoadedModel) -> None:
    """Writes a result with its key."""
    write_json(path, {"key": key.as_dict(), "result": result.as_dict()})


def read_result(path: Path) -> Result | None:
    """The result of a task, or None if the file is absent or incomplete: the task is then computed again."""
    found = _read_record(Result, path)
    if found is None or not found.examples:
        return None
    complete = all(len(column) == len(found.examples) for column in found.items.values())
    return found if complete and all(len(ends) == 2 for ends in found.intervals.values()) else None


def read_model(path: Path) -> LoadedModel | None:
    """The facts about a model, or None if the file is absent or incomplete."""
    return _read_record(LoadedModel, path)


def other_result(path: Path, key: Key) -> str | None:
    """The difference of the latest other result of the same model and task, in words; None if there is none."""
    task = path.stem.rpartition("-")[0]
    others = [file for file in path.parent.glob(f"{glob.escape(task)}-*.json") if file.stem.rpartition("-")[0] == task]
    if not others:
        return None
    found = _read(max(others, key=lambda file: file.stat().st_mtime)).get("key")
    wanted = plain(key.as_dict())
    if not isinstance(found, dict) or not found:
        return None  # a damaged file counts as absent
    return " and ".join(_WORDS.get(part, part) for part in wanted if found.get(part) != wanted[part])


def read_settings(directory: Path) -> Settings:
    """The settings of an evaluation.

    Raises:
        InputError: The directory holds no evaluation, or its settings are damaged.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(f"{directory}: no {SETTINGS} there, so no evaluation; give the output_dir of `crrelu eval`")
    with reading(str(path), _WRONG, ours=True):
        settings = Settings.of(_read(path))
        _require_consistent(settings)
    return settings


def _require_consistent(settings: Settings) -> None:
    models, wanted = settings.models, {MODEL, *settings.tasks}
    if settings.baseline not in models or settings.reference not in (None, *models):
        raise InputError("the baseline or the reference is not one of the models")
    if not models.keys() == settings.tokenizers.keys() == settings.results.keys():
        raise InputError("models, tokenizers and results name different models")
    if not all(wanted <= names.keys() for names in settings.results.values()):
        raise InputError("a task has no result file")


def _read_record(kind: type[_R], path: Path) -> _R | None:
    with contextlib.suppress(InputError):
        return kind.of(_read(path).get("result"))
    return None


def _read(path: Path) -> dict[str, Any]:
    """The content of one of our files; a damaged file counts as absent."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
