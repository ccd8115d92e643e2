"""Tasks of lm-evaluation-harness, its own or local ones: run on a model, with a value for every item."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from crrelu_llm.data import load_dataset, sha256
from crrelu_llm.data.sources import get_split
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.lm import EvaluationLM, quiet
from crrelu_llm.evaluation.measured import Measured, linearised, shares_of, spread_over_groups
from crrelu_llm.evaluation.rows import no_column, try_rows
from crrelu_llm.evaluation.suites import TaskSpec, import_functions

_SEED = 1234  # lm-eval's, of the choice of examples
_SHOWN = 600  # characters of a prompt or an answer that are kept to look at


class HarnessTask:
    """A task or a group of tasks of lm-eval, its data loaded.

    Attributes:
        name: What it is called.
        rows: How many items will be evaluated.
        config: What decides its numbers besides the model and the data.
        data: Name, rows and SHA-256 of the rows.
    """

    def __init__(self, spec: TaskSpec, data_dir: Path | None, limit: int | None, chat: bool, manager: Any) -> None:
        """Loads a task's data and tries the items that will be evaluated.

        Raises:
            InputError: No such task, its data cannot be had, or has a row that the task cannot use.
        """
        self.name = spec.name
        self._chat = chat
        with quiet():
            task = _local(spec, data_dir) if spec.config is not None else _own(spec, manager)
            self._loaded = manager.load([task])
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        self._group_key = (spec.config or {}).get("metadata", {}).get("group_by")
        documents = {name: _documents(task, spec) for name, task in self._tasks.items()}
        self._samples = self._sample(documents, limit) if limit is not None else None
        chosen: Any = documents if self._samples is None else self._samples
        self.rows = sum(map(len, chosen.values()))
        for name, rows in documents.items():
            indices = range(len(rows)) if self._samples is None else self._samples[name]
            try_rows(self._tasks[name], rows, indices, spec)
        self.config = {
            "tasks": {name: _config(task) for name, task in self._tasks.items()},
            "chat_template": chat,
            "samples": self._samples,
        }
        every = (row for rows in documents.values() for row in rows)
        total = sum(map(len, documents.values()))
        self.data = [{"name": ", ".join(spec.files()) or spec.name, "rows": total, "sha256": sha256(every)}]

    def _sample(self, documents: dict[str, Any], limit: int) -> dict[str, list[int]]:
        """The first items of a task; of one made of groups, about as many of each."""
        if len(documents) > 1:
            each = max(1, limit // len(documents))
            return {name: list(range(min(each, len(rows)))) for name, rows in documents.items()}
        ((name, rows),) = documents.items()
        if self._group_key is None:
            return {name: list(range(min(limit, len(rows))))}
        return {name: spread_over_groups([str(row[self._group_key]) for row in rows], limit)}

    def run(self, lm: EvaluationLM) -> Measured:
        """Evaluates a model."""
        # lm-eval's simple_evaluate does the same, and besides asks pip and the machine about themselves each time.
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        for task in self._tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        with quiet() as cuts:
            found = evaluate(
                lm=lm,
                task_dict=self._loaded,
                samples=self._samples,
                bootstrap_iters=0,
                apply_chat_template=self._chat,
                fewshot_as_multiturn=self._chat,
            )
        measured = self._measured(found)
        if cuts.count:
            measured.notes.append(f"{cuts.count} requests are longer than the model's context and lost their start")
        return measured

    def _measured(self, found: Any) -> Measured:
        several = len(self._tasks) > 1
        measured = Measured({}, {})
        columns: dict[str, list[Any]] = {}
        groups: list[str] = []
        for name in self._tasks:
            samples = found["samples"][name]
            filters = list(dict.fromkeys(sample["filter"] for sample in samples))
            first = [sample for sample in samples if sample["filter"] == filters[0]]
            own = [name if several else str(sample["doc"].get(self._group_key, "")) for sample in first]
            groups += own
            measured.examples += [_example(sample, group) for sample, group in zip(first, own, strict=True)]
            measured.not_finite += sum(1 for sample in first if not _finite(sample["resps"]))
            for filter_name in filters:
                rows = [sample for sample in samples if sample["filter"] == filter_name]
                for metric in rows[0]["metrics"]:
                    key = metric if filter_name == "none" else f"{metric},{filter_name}"
                    columns.setdefault(key, []).extend(row[metric] for row in rows)
        reported = self._reported(found)
        for key, values in columns.items():
            _add(measured, key, values, reported.get(key))
        for key, value in reported.items():
            measured.metrics.setdefault(key, value)
        measured.higher_is_better |= self._directions(found, measured)
        if any(groups):
            measured.groups = _group_means(measured.items, groups)
        return measured.finish()

    def _reported(self, found: Any) -> dict[str, float]:
        """What lm-eval itself says of the task or the group."""
        name = self.name if self.name in found["results"] else next(iter(self._tasks))
        values = {}
        for key, value in found["results"][name].items():
            metric, comma, filter_name = key.partition(",")
            if comma and "_stderr" not in metric and isinstance(value, int | float):
                values[metric if filter_name == "none" else key] = float(value)
        return values

    def _directions(self, found: Any, measured: Measured) -> dict[str, bool]:
        directions: dict[str, bool] = {}
        for entries in found.get("higher_is_better", {}).values():
            for key in measured.metrics:
                if entries.get(key.partition(",")[0]) is not None:
                    directions[key] = bool(entries[key.partition(",")[0]])
        return directions


def manager_for(specs: list[TaskSpec]) -> Any:
    """lm-eval's index of tasks: its own only where a suite names some, as reading it takes seconds.

    Raises:
        InputError: A task that lm-eval does not have.
    """
    own = [spec for spec in specs if spec.config is None]
    with quiet():
        manager = TaskManager(include_defaults=bool(own))
    for spec in own:
        if spec.name not in manager.all_tasks:
            raise InputError(f"{spec.source}: lm-eval has no task {spec.name!r}; `lm-eval ls tasks` lists its tasks")
    return manager


def _own(spec: TaskSpec, manager: Any) -> Any:
    loaded = _loaded(spec, lambda: manager.load([spec.name]))
    return loaded["groups"].get(spec.name) or loaded["tasks"][spec.name]


def _loaded(spec: TaskSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # of datasets, the hub, or packages that a task needs: the user's to mend
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the task {spec.name}: lm-eval cannot load it: {reason}; it needs the network or cached data, or take "
            "the suite local with --data_dir"
        ) from error


def _local(spec: TaskSpec, data_dir: Path | None) -> ConfigurableTask:
    """A task of a configuration: its data are the files it names, or else what lm-eval loads from the hub."""
    config = import_functions(spec.config, spec.name)
    _require_nltk((config.get("metadata") or {}).get("nltk"), spec.name)
    if not _data_files(spec):
        return _loaded(spec, lambda: ConfigurableTask(config=dict(config)))
    files = {split: str(data_path(path, data_dir)) for split, path in _data_files(spec).items()}

    def read(**_: Any) -> dict[str, Any]:
        return {split: get_split(load_dataset(path), "train", path) for split, path in files.items()}

    kept = {key: value for key, value in config.items() if key != "dataset_kwargs"}
    try:
        return ConfigurableTask(config={**kept, "custom_dataset": read})
    except InputError:
        raise
    except Exception as error:  # jinja2 and lm-eval raise errors of many kinds
        raise InputError(no_column(spec, error)) from error


def _require_nltk(resource: str | None, task: str) -> None:
    """A score that needs nltk's data asks for it when everything has been generated: too late."""
    if resource is None:
        return
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError as error:
        name = resource.rpartition("/")[2]
        raise InputError(
            f"the task {task} needs nltk's {name}: `python -m nltk.downloader {name}` with a network, or leave "
            "the task out with --tasks"
        ) from error


def data_path(path: str, data_dir: Path | None) -> Path:
    """Where a data file of a task file is."""
    return (data_dir / path) if data_dir is not None else Path(path)


def _data_files(spec: TaskSpec) -> dict[str, str]:
    return ((spec.config or {}).get("dataset_kwargs") or {}).get("data_files") or {}


def _documents(task: Any, spec: TaskSpec) -> Any:
    """A task's items, after a look at their columns."""
    try:
        rows = task.eval_docs
        row = next(iter(rows))
    except Exception as error:
        raise InputError(no_column(spec, error)) from error
    key = ((spec.config or {}).get("metadata") or {}).get("group_by")
    if key is not None and key not in row:
        raise InputError(no_column(spec, KeyError(key)))
    return rows


def _config(task: Any) -> Any:
    """A task's configuration without what names places on this machine."""
    config = task.dump_config()
    for key in ("custom_dataset", "dataset_kwargs"):
        config.pop(key, None)
    return json.loads(json.dumps(config, default=_spelled))


def _spelled(value: Any) -> str:
    """What is no plain value, as text that is the same in every process: functions by their names."""
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"


def _add(measured: Measured, key: str, values: list[Any], reported: float | None) -> None:
    """A column of items' values: a mean, a perplexity or a ratio."""
    if all(isinstance(value, int | float | np.number) for value in values):
        numbers = [float(value) for value in values]
        if key == "perplexity":  # the values are log-likelihoods
            measured.items["loss"] = [-value for value in numbers]
            measured.metrics["loss"] = float(np.mean(measured.items["loss"]))
        elif reported is None or math.isclose(float(np.mean(numbers)), reported, rel_tol=1e-9, abs_tol=1e-12):
            measured.items[key] = numbers
            measured.metrics[key] = float(np.mean(numbers)) if reported is None else reported
    elif key == "bits_per_byte" and all(isinstance(value, tuple) and len(value) == 2 for value in values):
        sums, weights = np.array(values, dtype=float).T
        measured.items[key] = linearised(-sums / math.log(2), weights)
        measured.shares[key] = shares_of(-sums / math.log(2), weights)


def _group_means(items: dict[str, list[float]], groups: list[str]) -> dict[str, dict[str, float]]:
    names = np.array(groups)
    return {
        str(group): {metric: float(np.mean(np.array(values)[names == group])) for metric, values in items.items()}
        for group in dict.fromkeys(groups)
    }


def _example(sample: dict[str, Any], group: str) -> dict[str, Any]:
    arguments = sample["arguments"]
    options = [str(argument[1]) if len(argument) > 1 else "" for argument in arguments]
    return {
        "id": sample["doc_id"],
        "group": group,
        "prompt": str(arguments[0][0])[-_SHOWN:],
        "options": [option[:_SHOWN] for option in options] if isinstance(arguments[0][-1], str) else [],
        "target": str(sample["target"])[:_SHOWN],
        "responses": _responses(sample["resps"]),
    }


def _responses(resps: list[Any]) -> list[Any]:
    """The log-likelihood of each option, or what was generated."""
    found = []
    for response in resps:
        first = response[0]
        value = first[0] if isinstance(first, tuple | list) else first
        found.append(value[:_SHOWN] if isinstance(value, str) else float(value))
    return found


def _finite(resps: list[Any]) -> bool:
    return all(isinstance(value, str) or math.isfinite(value) for value in _responses(resps))
