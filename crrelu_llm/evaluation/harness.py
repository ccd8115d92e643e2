"""Tasks of lm-evaluation-harness, its own and local ones, with a value for every item."""

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
from crrelu_llm.evaluation.measured import SHOWN, Columns, Item, Measured, linearised, shares_of, spread_over_groups
from crrelu_llm.evaluation.rows import no_column, try_rows
from crrelu_llm.evaluation.suites import TaskSpec, import_functions
from crrelu_llm.report.schema import Data, Values

_SEED = 1234  # lm-eval's own, for the choice of few-shot examples


class HarnessTask:
    """A task or a group of tasks of lm-eval with its data.

    Attributes:
        name: The name of the task.
        rows: The number of items to evaluate.
        config: Everything except the model and the data that affects its numbers.
        data: The identity of the data.
    """

    def __init__(self, spec: TaskSpec, data_dir: Path | None, limit: int | None, chat: bool, manager: Any) -> None:
        """Loads the data of a task and checks the items to evaluate.

        Raises:
            InputError: The task does not exist, or its data cannot be loaded or has a row that the task cannot use.
        """
        self.name = spec.name
        self._chat = chat
        with quiet():
            task = _local(spec, data_dir) if spec.config is not None else _own(spec, manager)
            self._loaded = manager.load([task])
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        self._group_key = (spec.config or {}).get("metadata", {}).get("group_by")
        _check_metrics(self._tasks, spec)
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
        self.data = [Data(name=", ".join(spec.files()) or spec.name, rows=total, sha256=sha256(every))]

    def _sample(self, documents: dict[str, Any], limit: int) -> dict[str, list[int]]:
        """The indices of the first items; in a task with groups, about the same number from each group."""
        if len(documents) > 1:
            each = max(1, limit // len(documents))
            return {name: list(range(min(each, len(rows)))) for name, rows in documents.items()}
        ((name, rows),) = documents.items()
        if self._group_key is None:
            return {name: list(range(min(limit, len(rows))))}
        return {name: spread_over_groups([str(row[self._group_key]) for row in rows], limit)}

    def run(self, lm: EvaluationLM) -> Measured:
        """Evaluates a model."""
        # The steps of lm-eval's simple_evaluate, which also queries pip and the machine on each call.
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
        note = f"{cuts.count} requests are longer than the model's context and lost their beginning"
        return self._measured(found, [note] if cuts.count else [])

    def _measured(self, found: Any, notes: list[str]) -> Measured:
        several = len(self._tasks) > 1
        columns: dict[str, list[Any]] = {}
        examples: list[Item] = []
        for name in self._tasks:
            samples = found["samples"][name]
            filters = list(dict.fromkeys(sample["filter"] for sample in samples))
            first = [sample for sample in samples if sample["filter"] == filters[0]]
            own = [name if several else str(sample["doc"].get(self._group_key, "")) for sample in first]
            examples += [_item(sample, group) for sample, group in zip(first, own, strict=True)]
            for filter_name in filters:
                rows = [sample for sample in samples if sample["filter"] == filter_name]
                for metric in rows[0]["metrics"]:
                    key = metric if filter_name == "none" else f"{metric},{filter_name}"
                    columns.setdefault(key, []).extend(row[metric] for row in rows)
        metrics, items, shares = _values(columns, self._reported(found))
        groups = [item.group for item in examples]
        return Measured(
            metrics=metrics,
            items=items,
            higher_is_better=_directions(found, metrics),
            groups=_group_means(items, groups) if any(groups) else {},
            examples=examples,
            shares=shares,
            notes=notes,
            not_finite=sum(not _finite(item) for item in examples),
        ).with_intervals()

    def _reported(self, found: Any) -> dict[str, float]:
        """The metrics that lm-eval itself reports for the task or the group."""
        name = self.name if self.name in found["results"] else next(iter(self._tasks))
        values = {}
        for key, value in found["results"][name].items():
            metric, comma, filter_name = key.partition(",")
            if comma and "_stderr" not in metric and isinstance(value, int | float):
                values[metric if filter_name == "none" else key] = float(value)
        return values


def manager_for(specs: list[TaskSpec]) -> Any:
    """lm-eval's index of tasks, with lm-eval's own only if a suite names one, because reading them takes seconds.

    Raises:
        InputError: lm-eval does not have a named task.
    """
    own = [spec for spec in specs if spec.config is None]
    with quiet():
        manager = TaskManager(include_defaults=bool(own))
    for spec in own:
        if spec.name not in manager.all_tasks:
            raise InputError(f"{spec.source}: lm-eval has no task {spec.name!r}; `lm-eval ls tasks` lists its tasks")
        if spec.name in manager.all_tags:
            raise InputError(f"{spec.source}: {spec.name!r} is a tag of lm-eval; name its tasks")
    return manager


def _own(spec: TaskSpec, manager: Any) -> Any:
    loaded = _loaded(spec, lambda: manager.load([spec.name]))
    return loaded["groups"].get(spec.name) or loaded["tasks"][spec.name]


def _loaded(spec: TaskSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # from datasets, the hub or a missing package: the user can resolve it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the task {spec.name}: lm-eval cannot load it: {reason}; it needs the network or cached data, unlike "
            "the suite local with --data_dir"
        ) from error


def _local(spec: TaskSpec, data_dir: Path | None) -> ConfigurableTask:
    """The task of a configuration, with data from the files that it names, or else from the hub."""
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
    """Checks for nltk's data, because a score that needs it would fail only after all answers are generated."""
    if resource is None:
        return
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError as error:
        name = resource.rpartition("/")[2]
        raise InputError(
            f"the task {task} needs nltk's {name}: run `python -m nltk.downloader {name}` with a network, or leave "
            "the task out with --tasks"
        ) from error


def data_path(path: str, data_dir: Path | None) -> Path:
    """The path of a data file that a task file names."""
    return (data_dir / path) if data_dir is not None else Path(path)


def _data_files(spec: TaskSpec) -> dict[str, str]:
    return ((spec.config or {}).get("dataset_kwargs") or {}).get("data_files") or {}


def _documents(task: Any, spec: TaskSpec) -> Any:
    """The items of a task, after a check of the first row."""
    try:
        rows = task.eval_docs
        row = next(iter(rows))
    except Exception as error:
        raise InputError(no_column(spec, error)) from error
    key = ((spec.config or {}).get("metadata") or {}).get("group_by")
    if key is not None and key not in row:
        raise InputError(no_column(spec, KeyError(key)))
    return rows


def _check_metrics(tasks: dict[str, Any], spec: TaskSpec) -> None:
    """Raises InputError if the tasks of a group have different metrics: then none has a value for every item."""
    metrics = {name: frozenset(task.aggregation()) for name, task in tasks.items()}
    if len(set(metrics.values())) > 1:
        first, *others = metrics
        other = next(name for name in others if metrics[name] != metrics[first])
        raise InputError(
            f"{spec.source}: the tasks of {spec.name} have different metrics ({first}, {other}); name single tasks"
        )


def _config(task: Any) -> Any:
    """The configuration of a task without the paths of this machine."""
    config = task.dump_config()
    for key in ("custom_dataset", "dataset_kwargs"):
        config.pop(key, None)
    return json.loads(json.dumps(config, default=_spelled))


def _spelled(value: Any) -> str:
    """A text for a value that JSON lacks, the same in every process: the name of a function, otherwise its `str`."""
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"


def _values(columns: dict[str, list[Any]], reported: dict[str, float]) -> tuple[Values, Columns, Columns]:
    """The metrics, values of items and shares from lm-eval's columns; a metric is a mean, a perplexity or a ratio."""
    metrics: Values = {}
    items: Columns = {}
    shares: Columns = {}
    for key, values in columns.items():
        if all(isinstance(value, int | float | np.number) for value in values):
            numbers = [float(value) for value in values]
            mean = float(np.mean(numbers))
            if key == "perplexity":  # the values are log-likelihoods
                items["loss"] = [-value for value in numbers]
                metrics["loss"] = -mean
            elif key not in reported or math.isclose(mean, reported[key], rel_tol=1e-9, abs_tol=1e-12):
                items[key] = [*numbers]
                metrics[key] = reported.get(key, mean)
        elif key == "bits_per_byte" and all(isinstance(value, tuple) and len(value) == 2 for value in values):
            sums, weights = np.array(values, dtype=float).T
            items[key] = linearised(-sums / math.log(2), weights)
            shares[key] = shares_of(-sums / math.log(2), weights)
    return metrics | {key: value for key, value in reported.items() if key not in metrics}, items, shares


def _directions(found: Any, metrics: Values) -> dict[str, bool]:
    return {
        key: bool(entries[key.partition(",")[0]])
        for entries in found.get("higher_is_better", {}).values()
        for key in metrics
        if entries.get(key.partition(",")[0]) is not None
    }


def _group_means(items: Columns, groups: list[str]) -> dict[str, Values]:
    names = np.array(groups)
    return {
        group: {metric: float(np.mean(np.array(values)[names == group])) for metric, values in items.items()}
        for group in dict.fromkeys(groups)
    }


def _item(sample: dict[str, Any], group: str) -> Item:
    arguments = sample["arguments"]
    options = [str(argument[1]) if len(argument) > 1 else "" for argument in arguments]
    return Item(
        id=sample["doc_id"],
        group=group,
        prompt=str(arguments[0][0])[-SHOWN:],
        options=[option[:SHOWN] for option in options] if isinstance(arguments[0][-1], str) else [],
        target=str(sample["target"])[:SHOWN],
        responses=[_response(response[0]) for response in sample["resps"]],
    )


def _response(first: Any) -> float | str:
    """The log-likelihood of an option, or the text that the model wrote."""
    value = first[0] if isinstance(first, tuple | list) else first
    return value[:SHOWN] if isinstance(value, str) else float(value)


def _finite(item: Item) -> bool:
    return all(isinstance(value, str) or (value is not None and math.isfinite(value)) for value in item.responses)
