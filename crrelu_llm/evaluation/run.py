"""Runs an evaluation: checks the input, keeps the results that are on disk, and computes the missing ones."""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.environment import environment, versions
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.evaluation import models as named
from crrelu_llm.evaluation.lm import EvaluationLM, build
from crrelu_llm.evaluation.models import NamedModel
from crrelu_llm.evaluation.prepare import Evaluation, Task, check_models, prepare_tasks
from crrelu_llm.evaluation.results import (
    MODEL,
    SETTINGS,
    Key,
    Result,
    Settings,
    other_result,
    read_model,
    read_result,
    read_settings,
    result_name,
    write_result,
)
from crrelu_llm.files import alone, write_json
from crrelu_llm.memory import PeakMemory
from crrelu_llm.patching import loading
from crrelu_llm.patching.finite import require_finite

_A_FEW_TOKENS = torch.arange(3, 35)[None]


@contextlib.contextmanager
def run_evaluation(evaluation: Evaluation) -> Iterator[dict[str, dict[str, str]]]:
    """Computes the missing results, and holds the lock of the directory while its context lasts.

    The caller builds the report within the context, from the files (`evaluation.report.build_report`).

    Yields:
        The error of each failed task, by model and task; the other results are on disk.

    Raises:
        InputError: The models, the tasks or their data are wrong, or another evaluation is at work in the directory;
            nothing has been computed.
        DiskError: The disk is full or read-only; the finished results are kept.
    """
    tokenizers, identities = check_models(evaluation)
    tasks = prepare_tasks(evaluation, tokenizers)
    keys = {model: _keys(evaluation, identity, tasks) for model, identity in identities.items()}
    with alone(evaluation.output_dir, "crrelu eval"):
        settings = _settings(evaluation, tasks, tokenizers, keys)
        write_json(evaluation.output_dir / SETTINGS, settings.as_dict())
        failures: dict[str, dict[str, str]] = {}
        if evaluation.why_dtype:
            print(evaluation.why_dtype, file=sys.stderr)
        with _saying_how_to_go_on():
            for model in evaluation.models:
                failed = _one_model(evaluation, model, tasks, keys[model.name], tokenizers[model.name])
                if failed:
                    failures[model.name] = failed
        if failures:
            write_json(evaluation.output_dir / SETTINGS, settings.but(failures=failures).as_dict())
        yield failures


def _keys(evaluation: Evaluation, identity: dict[str, Any], tasks: list[Task]) -> dict[str, Key]:
    """The keys of a model's results, by task."""
    found = versions()
    model = Key(
        model=identity,
        dtype=evaluation.dtype,
        device=evaluation.device,
        versions={name: found[name] for name in ("crrelu_llm", "lm_eval", "torch", "transformers")},
    )
    if evaluation.max_length is not None:
        model = model.but(max_length=evaluation.max_length)
    return {MODEL: model} | {task.name: model.but(task=task.config, data=task.data) for task in tasks}


def _one_model(
    evaluation: Evaluation, model: NamedModel, tasks: list[Task], keys: dict[str, Key], tokenizer: Any
) -> dict[str, str]:
    """Evaluates a model on the tasks without a result; returns the errors by task."""
    places = {task: evaluation.output_dir / result_name(model.name, task, key) for task, key in keys.items()}
    todo = []
    for task in tasks:
        if read_result(places[task.name]) is not None:
            _say(f"{model.name} × {task.name}: kept")
            continue
        other = other_result(places[task.name], keys[task.name])
        if other:
            _say(f"{model.name} × {task.name}: a result on disk is for {other}; it is kept, and a new one is computed")
        todo.append(task)
    if not todo and read_model(places[MODEL]) is not None:
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
    evaluation: Evaluation, model: NamedModel, place: Path, key: Key, tokenizer: Any
) -> tuple[EvaluationLM | None, str | None]:
    """Loads a model and writes the facts about it; returns the language model or the error."""
    _say(f"{model.name}: loading {model.path}")
    try:
        loaded = named.load(model, evaluation.dtype)
        loading.require_embeddings(tokenizer, loaded.get_input_embeddings().weight.shape[0], model.path)
        write_result(place, key, named.describe_model(loaded, model.path))
        device = torch.device(evaluation.device)
        lm = build(loaded, tokenizer, evaluation.batch_size, device, evaluation.max_length)
        tokens = _A_FEW_TOKENS % loaded.config.get_text_config().vocab_size
        require_finite(loaded, tokens, "none of its tasks is evaluated")
    except InputError as error:
        return None, str(error)
    except DiskError:
        raise
    except Exception as error:  # from many libraries; the other models are still evaluated
        return None, f"cannot be loaded: {_reason(error)}"
    return lm, None


def _one_task(task: Task, lm: Any, place: Path, key: Key) -> str | None:
    """Evaluates a task and writes its result; returns the error, because the other tasks are still evaluated."""
    started = time.perf_counter()
    try:
        with PeakMemory() as memory:
            measured = task.run(lm)
    except DiskError:
        raise
    except Exception as error:
        return _reason(error)
    if measured.not_finite:
        return (
            f"{measured.not_finite} of {task.rows} items gave a value that is not a finite number; is the checkpoint "
            "complete, or does it need a wider --dtype?"
        )
    seconds = time.perf_counter() - started
    write_result(place, key, Result(**measured.given, seconds=seconds, peak_memory_bytes=memory.bytes))
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _settings(
    evaluation: Evaluation, tasks: list[Task], tokenizers: dict[str, Any], keys: dict[str, dict[str, Key]]
) -> Settings:
    settings = Settings(
        models={model.name: model.path for model in evaluation.models},
        tasks=[task.name for task in tasks],
        suite=evaluation.suite,
        baseline=evaluation.baseline,
        reference=evaluation.reference,
        beta=evaluation.beta,
        limit=evaluation.limit,
        chat_template=evaluation.chat,
        dtype=evaluation.dtype,
        batch_size=evaluation.batch_size,
        max_length=evaluation.max_length,
        device=evaluation.device,
        command=evaluation.command,
        tokenizers={name: named.tokenizer_identity(tokenizer) for name, tokenizer in tokenizers.items()},
        results={
            model: {task: result_name(model, task, key) for task, key in own.items()} for model, own in keys.items()
        },
        data=[entry for task in tasks for entry in task.data],
        environment=environment(),
        failures={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with contextlib.suppress(InputError):
        before = read_settings(evaluation.output_dir)
        if before.results == settings.results:  # the same evaluation, continued
            return settings.but(created=before.created)
    return settings


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
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
    """Prints a line if a launcher has started several processes, because only the first one evaluates."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        _say(f"{processes} processes were started; only the first one evaluates")
