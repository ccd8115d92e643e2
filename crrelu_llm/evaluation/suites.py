"""Reads suites (`eval/suites/*.yaml`) and task files (`eval/tasks/*.yaml`): the tasks of an evaluation."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crrelu_llm.errors import InputError
from crrelu_llm.recipes_path import eval_dir

OWN_KINDS = ("preference", "language_modelling")
_KEYS = {"description", "source", "tasks", "on_request", "template"}
_SOURCES = ("lm_eval", "local")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite.

    Attributes:
        name: Its name in results and for `--tasks`.
        config: The content of its task file, or None for lm-eval's own task of this name.
        source: The path of the file that names it, for messages.
    """

    name: str
    config: dict[str, Any] | None
    source: str

    @property
    def kind(self) -> str:
        """`"preference"`, `"language_modelling"`, or `"lm_eval"`."""
        kind = (self.config or {}).get("output_type")
        return str(kind) if kind in OWN_KINDS else "lm_eval"

    def files(self) -> list[str]:
        """The data files that the task file names, as written there."""
        config = self.config or {}
        found = (config.get("dataset_kwargs") or {}).get("data_files") or {}
        return [config["data"]] if "data" in config else [str(path) for path in found.values()]


def suite_names() -> list[str]:
    """The names of the shipped suites."""
    return sorted(path.stem for path in (eval_dir() / "suites").glob("*.yaml"))


def read_suite(name: str, only: list[str] | None = None, data: list[str] | None = None) -> list[TaskSpec]:
    """The tasks of a suite, in its order.

    Args:
        name: The name of a shipped suite, or a YAML file.
        only: The names of the tasks to take; None takes all except those on request.
        data: Files for a suite that is a template; each file becomes a task.

    Raises:
        InputError: The suite or a task does not exist, or the suite is not valid.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = eval_dir() / "suites" / f"{name}.yaml"
        if not path.is_file():
            raise InputError(f"--suite {name}: no such suite; choose {', '.join(suite_names())}, or give a .yaml file")
    suite = _read_yaml(path)
    wrong = sorted(set(suite) - _KEYS)
    if wrong:
        raise InputError(f"{path}: a suite has no key {wrong[0]!r}; its keys are {', '.join(sorted(_KEYS))}")
    if "template" in suite:
        if not isinstance(suite["template"], dict):
            raise InputError(f"{path}: template must be a mapping of keys and values, not {suite['template']!r}")
        specs = _from_template(suite["template"], path, data or [])
        names = [spec.name for spec in specs]
        twice = [spec.files()[0] for spec in specs if names.count(spec.name) > 1]
        if twice:
            raise InputError(
                f"--data {' '.join(twice)}: a task takes the name of its file, and these names are equal; rename one"
            )
        return _chosen(specs, [], only, path)
    if data:
        raise InputError(f"--data: the suite {name} names its data itself; give its directory with --data_dir")
    source = suite.get("source", "lm_eval")
    if source not in _SOURCES:
        raise InputError(f"{path}: source must be {' or '.join(_SOURCES)}, not {source!r}")
    for key in ("tasks", "on_request"):
        if not isinstance(suite.get(key) or [], list):
            raise InputError(f"{path}: {key} must be a list of tasks, not {suite[key]!r}")
    tasks, on_request = (
        [_task(entry, source, path) for entry in suite.get(key) or []] for key in ("tasks", "on_request")
    )
    return _chosen(tasks, on_request, only, path)


def _chosen(tasks: list[TaskSpec], on_request: list[TaskSpec], only: list[str] | None, path: Path) -> list[TaskSpec]:
    everything = [*tasks, *on_request]
    names = [task.name for task in everything]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: the task {twice} is there twice; rename one of them")
    if not everything:
        raise InputError(f"{path}: the suite has no tasks; list them under `tasks`")
    if only is None:
        return tasks
    unknown = [name for name in only if name not in names]
    if unknown:
        raise InputError(f"--tasks {unknown[0]}: no such task in {path.name}; it has: {', '.join(names)}")
    return [task for task in everything if task.name in only]


def _task(entry: Any, source: str, suite: Path) -> TaskSpec:
    """The task of an entry: a name, a task file beside the suite, or a whole task configuration."""
    if isinstance(entry, dict):
        return _spec(entry, suite)
    if not isinstance(entry, str):
        raise InputError(f"{suite}: a task is a name, a .yaml file or a configuration, not {entry!r}")
    if entry.endswith((".yaml", ".yml")):
        path = suite.parent / entry
        return _spec(_read_yaml(path), path)
    if source == "lm_eval":
        return TaskSpec(entry, None, str(suite))
    path = eval_dir() / "tasks" / f"{entry}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise InputError(f"{suite}: no local task {entry!r}; there are: {known}")
    return _spec(_read_yaml(path), path)


def _spec(config: dict[str, Any], path: Path) -> TaskSpec:
    name = config.get("task")
    if not isinstance(name, str) or not is_name(name):
        raise InputError(f"{path}: a task needs a name without a slash under the key `task`")
    if name == "model":  # the name of the result about the model itself
        raise InputError(f"{path}: no task can be called model; rename the task, or its data file")
    _require_mappings(config, path)
    spec = TaskSpec(name, config, str(path))
    if spec.kind in OWN_KINDS and not isinstance(config.get("data"), str):
        raise InputError(f"{path}: the task {name} needs a data file under the key `data`")
    return spec


def is_name(text: str) -> bool:
    """Whether a text can be part of a file name: one line, no slash, not too long."""
    return bool(text) and text.isprintable() and "/" not in text and len(text.encode()) <= 200


def _require_mappings(config: dict[str, Any], path: Path) -> None:
    kwargs = config.get("dataset_kwargs")
    for key, value in (
        ("metadata", config.get("metadata")),
        ("dataset_kwargs", kwargs),
        ("data_files", kwargs.get("data_files") if isinstance(kwargs, dict) else None),
    ):
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{path}: {key} must be a mapping of keys and values, not {value!r}")


def _from_template(template: dict[str, Any], path: Path, data: list[str]) -> list[TaskSpec]:
    if not data:
        raise InputError(f"the suite {path.stem} needs its data: give --data FILE [FILE ...]")
    return [_spec({"task": _stem(file), **template, "data": file}, path) for file in data]


def _stem(file: str) -> str:
    name = Path(file).name.removesuffix(".gz").removesuffix(".zst")
    folder = Path(file).resolve().parent.name
    stem = Path(name).stem.removeprefix("builtin:")
    # train, eval and the like mean nothing without the name of their folder.
    return f"{folder}-{stem}" if folder and stem in ("train", "eval", "test", "valid", "validation") else stem


class _Loader(yaml.SafeLoader):
    """YAML without arbitrary objects; `!function module.name` names a function of this package or of lm-eval."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    name = str(loader.construct_scalar(node))
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in ("crrelu_llm", "lm_eval"):
        raise InputError(f"!function {name}: only functions of crrelu_llm and lm_eval can be named")
    return _Function(module, attribute)


@dataclass(frozen=True)
class _Function:
    """The name of a function, which is imported when its task is prepared: some functions need optional packages."""

    module: str
    attribute: str


_Loader.add_constructor("!function", _function)


def import_functions(value: Any, task: str) -> Any:
    """The configuration of a task with its named functions imported.

    Raises:
        InputError: A function cannot be imported.
    """
    if isinstance(value, dict):
        return {key: import_functions(entry, task) for key, entry in value.items()}
    if isinstance(value, list):
        return [import_functions(entry, task) for entry in value]
    if not isinstance(value, _Function):
        return value
    try:
        return getattr(importlib.import_module(value.module), value.attribute)
    except (ImportError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the task {task} needs {value.module}: {reason}; install it (pip install "
            "'lm-eval[ifeval]'), or leave the task out with --tasks"
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of keys and values")
    return content
