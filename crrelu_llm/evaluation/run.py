"""Evaluates models on tasks: what is wrong is said first, what is on disk is kept, the rest is computed and kept."""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.environment import environment, versions
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.evaluation import models as named
from crrelu_llm.evaluation.harness import HarnessTask, data_path, manager_for
from crrelu_llm.evaluation.language_modelling import TextTask
from crrelu_llm.evaluation.lm import build
from crrelu_llm.evaluation.models import NamedModel
from crrelu_llm.evaluation.preference import PreferenceTask
from crrelu_llm.evaluation.results import (
    MODEL,
    SETTINGS,
    other_result,
    read_result,
    read_settings,
    result_name,
    write_result,
)
from crrelu_llm.evaluation.suites import TaskSpec
from crrelu_llm.files import alone, plain, write_json
from crrelu_llm.memory import PeakMemory
from crrelu_llm.patching import loading
from crrelu_llm.patching.finite import require_finite

_A_FEW_TOKENS = torch.arange(3, 35)[None]


@dataclass
class Evaluation:
    """What is evaluated, and where.

    Attributes:
        models: The models; none has the name of another.
        specs: The tasks.
        output_dir: Where everything goes.
        baseline: Name of the model that the others are compared with.
        reference: Name of the model that rewards of preference tasks are measured against.
        beta: DPO's β, for these rewards.
        suite: Name of the suite, for the report.
        data_dir: Where local data files are.
        limit: The most items of a task.
        chat: Whether to apply the chat template.
        dtype: What models are loaded in.
        batch_size: Rows of a batch, or `"auto"`.
        max_length: The longest context in tokens; None for the models' own.
        device: Where to compute.
        command: The exact command, for the report.
    """

    models: list[NamedModel]
    specs: list[TaskSpec]
    output_dir: Path
    baseline: str
    reference: str | None = None
    beta: float = 0.1
    suite: str = ""
    data_dir: Path | None = None
    limit: int | None = None
    chat: bool = False
    dtype: str = "float32"
    batch_size: int | str = "auto"
    max_length: int | None = None
    device: str = "cpu"
    command: str = ""


@contextlib.contextmanager
def run_evaluation(evaluation: Evaluation) -> Iterator[dict[str, dict[str, str]]]:
    """Computes what is missing, and keeps other evaluations out of the directory as long as its context lasts.

    The report is made within it, from the files, by `comparison.evaluation.build_report`.

    Yields:
        The tasks that failed and why, by model; the others are on disk.

    Raises:
        InputError: Anything wrong with the models, the tasks or their data, before the long work; another evaluation
            at work in the directory.
        DiskError: The disk is full or read-only; what is finished is kept.
    """
    tokenizers, identities = _check_models(evaluation)
    tasks = prepare_tasks(evaluation)
    for name, tokenizer in tokenizers.items():  # before any model is loaded
        for task in tasks:
            if isinstance(task, PreferenceTask):
                task.written_by(tokenizer, name)
    keys = {model: _keys(evaluation, identity, tasks) for model, identity in identities.items()}
    with alone(evaluation.output_dir, "crrelu eval"):
        settings = _settings(evaluation, tasks, tokenizers, keys)
        write_json(evaluation.output_dir / SETTINGS, settings)
        failures: dict[str, dict[str, str]] = {}
        with _saying_how_to_go_on():
            for model in evaluation.models:
                failed = _one_model(evaluation, model, tasks, keys[model.name], tokenizers[model.name])
                if failed:
                    failures[model.name] = failed
        if failures:
            write_json(evaluation.output_dir / SETTINGS, settings | {"failures": failures})
        yield failures


def _keys(evaluation: Evaluation, identity: dict[str, Any], tasks: list[Any]) -> dict[str, dict[str, Any]]:
    """All that decides the numbers of a model, by task."""
    found = versions()
    common: dict[str, Any] = {
        "model": identity,
        "dtype": evaluation.dtype,
        "device": evaluation.device,
        # those that may change a number
        "versions": {name: found[name] for name in ("crrelu_llm", "lm_eval", "torch", "transformers")},
    }
    if evaluation.max_length is not None:
        common["max_length"] = evaluation.max_length
    return {MODEL: common} | {task.name: common | {"task": task.config, "data": task.data} for task in tasks}


def _check_models(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizers and identities of all models, before any of them is loaded."""
    keys = {model.name: named.identity(model) for model in evaluation.models}
    for model in evaluation.models:
        named.require_weights(model)
        named.require_adapter(model)
    tokenizers = {model.name: named.load_tokenizer(model) for model in evaluation.models}
    for model in evaluation.models:
        if evaluation.chat and not tokenizers[model.name].chat_template:
            raise InputError(
                f"--apply_chat_template: the tokenizer of {model.name} ({model.path}) has no chat template"
            )
    if evaluation.reference is not None:
        wanted = named.tokenizer_identity(tokenizers[evaluation.reference])
        for name, tokenizer in tokenizers.items():
            if named.tokenizer_identity(tokenizer) != wanted:
                raise InputError(
                    f"--reference {evaluation.reference}: {name} has another tokenizer, so its rewards against that "
                    "model mean nothing; take a reference with the same one"
                )
    return tokenizers, keys


def prepare_tasks(evaluation: Evaluation) -> list[Any]:
    """The tasks with their data loaded and the items that will be evaluated tried.

    Raises:
        InputError: A data file that does not exist, a task that lm-eval does not have, or a column that is missing.
    """
    absent = [
        (spec.name, path)
        for spec in evaluation.specs
        for path in spec.files()
        if (evaluation.data_dir is not None or spec.kind == "lm_eval")
        and not data_path(path, evaluation.data_dir).is_file()
    ]
    if absent:
        where = evaluation.data_dir if evaluation.data_dir is not None else "here (no --data_dir was given)"
        raise InputError(
            f"{where}: no {', '.join(path for _, path in absent)}, needed by {', '.join(name for name, _ in absent)}; "
            "put the data there, or name the other tasks with --tasks"
        )
    manager = manager_for(evaluation.specs)
    return [_prepare(spec, evaluation, manager) for spec in evaluation.specs]


def _prepare(spec: TaskSpec, evaluation: Evaluation, manager: Any) -> Any:
    if spec.kind == "lm_eval":
        return HarnessTask(spec, evaluation.data_dir, evaluation.limit, evaluation.chat, manager)
    source = (spec.config or {})["data"]
    path: Path | str = source
    if evaluation.data_dir is not None and data_path(source, evaluation.data_dir).is_file():
        path = data_path(source, evaluation.data_dir)
    if spec.kind == "preference":
        return PreferenceTask(spec.name, path, evaluation.limit, evaluation.chat)
    return TextTask(spec.name, path, evaluation.limit)


def _one_model(
    evaluation: Evaluation, model: NamedModel, tasks: list[Any], keys: dict[str, Any], tokenizer: Any
) -> dict[str, str]:
    """Evaluates a model on the tasks that it has no result of; returns what failed."""
    places = {task: evaluation.output_dir / result_name(model.name, task, key) for task, key in keys.items()}
    todo = []
    for task in tasks:
        if read_result(places[task.name]) is not None:
            _say(f"{model.name} × {task.name}: kept")
            continue
        other = other_result(places[task.name], keys[task.name])
        if other:
            _say(f"{model.name} × {task.name}: a result on disk is of {other}; it is kept, and this one is computed")
        todo.append(task)
    if not todo and read_result(places[MODEL]) is not None:
        return {}
    lm, wrong = _load(evaluation, model, places[MODEL], keys[MODEL], tokenizer)
    if wrong is not None:
        _say(f"{model.name}: {wrong}")
        return dict.fromkeys([task.name for task in todo] or [MODEL], wrong)
    failed = {}
    for index, task in enumerate(todo):
        _say(f"{model.name} × {task.name} [{index + 1}/{len(todo)}]: {task.rows} items")
        wrong = _one_task(task, lm, places[task.name], keys[task.name])
        if wrong is not None:
            failed[task.name] = wrong
            _say(f"{model.name} × {task.name}: {wrong}")
    del lm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failed


def _load(
    evaluation: Evaluation, model: NamedModel, place: Path, key: dict[str, Any], tokenizer: Any
) -> tuple[Any, str | None]:
    """Loads a model and keeps what is to be known of it; returns why it failed, if it did."""
    _say(f"{model.name}: loading {model.path}")
    try:
        loaded = named.load(model, evaluation.dtype)
        loading.require_embeddings(tokenizer, loaded.get_input_embeddings().weight.shape[0], model.path)
        write_result(place, key, named.describe(loaded) | {"path": model.path})
        device = torch.device(evaluation.device)
        lm = build(loaded, tokenizer, evaluation.batch_size, device, evaluation.max_length)
        tokens = _A_FEW_TOKENS % loaded.config.get_text_config().vocab_size
        require_finite(loaded, tokens, "none of its tasks is evaluated")
    except InputError as error:
        return None, str(error)
    except DiskError:
        raise
    except Exception as error:  # of many libraries; the other models must not fail with it
        return None, f"cannot be loaded: {_reason(error)}"
    return lm, None


def _one_task(task: Any, lm: Any, place: Path, key: dict[str, Any]) -> str | None:
    """Evaluates and keeps one task; returns why it failed, if it did: the others must not fail with it."""
    started = time.perf_counter()
    try:
        with PeakMemory() as memory:
            measured = task.run(lm)
    except (KeyboardInterrupt, DiskError):
        raise
    except Exception as error:
        return _reason(error)
    if measured.not_finite:
        return (
            f"{measured.not_finite} of {task.rows} items gave a value that is not a finite number; is the checkpoint "
            "whole, or does it need a wider --dtype?"
        )
    cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": memory.bytes}
    write_result(place, key, measured.as_dict() | cost)
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _settings(
    evaluation: Evaluation, tasks: list[Any], tokenizers: dict[str, Any], keys: dict[str, Any]
) -> dict[str, Any]:
    settings = {
        "models": {model.name: model.path for model in evaluation.models},
        "tasks": [task.name for task in tasks],
        "suite": evaluation.suite,
        "baseline": evaluation.baseline,
        "reference": evaluation.reference,
        "beta": evaluation.beta,
        "limit": evaluation.limit,
        "chat_template": evaluation.chat,
        "dtype": evaluation.dtype,
        "batch_size": evaluation.batch_size,
        "max_length": evaluation.max_length,
        "device": evaluation.device,
        "command": evaluation.command,
        "tokenizers": {name: named.tokenizer_identity(tokenizer) for name, tokenizer in tokenizers.items()},
        "results": {
            model: {task: result_name(model, task, key) for task, key in own.items()} for model, own in keys.items()
        },
        "data": [entry for task in tasks for entry in task.data],
        "environment": environment(),
        "failures": {},
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.suppress(InputError):
        before = read_settings(evaluation.output_dir)
        if before.get("results") == plain(settings["results"]):  # the same evaluation gone on with
            created = before["created"]
    return settings | {"created": created}


@contextlib.contextmanager
def _saying_how_to_go_on() -> Any:
    kept = "finished tasks are kept; run the same command again to go on"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None
    except DiskError as error:
        raise DiskError(f"{error}; {kept}") from error


def _say(line: str) -> None:
    print(f"eval: {line}", file=sys.stderr, flush=True)


def say_alone() -> None:
    """Says under a launcher that its other processes have nothing to do."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        _say(f"{processes} processes were started; the first one evaluates alone")
