"""Checks every row of a task before any model is loaded; a row that cannot be used is reported with its number."""

from collections.abc import Iterable
from typing import Any

from crrelu_llm.compat.lm_eval import compiling_once
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.suites import TaskSpec


def try_rows(task: Any, rows: Any, chosen: Iterable[int], spec: TaskSpec) -> None:
    """Renders the prompt, the answer and the choices of rows, as lm-eval will.

    Args:
        task: lm-eval's task.
        rows: Its items.
        chosen: The indices of the items to evaluate.
        spec: The origin of the task, for messages. If it is a task file, the answers are also checked; lm-eval's own
            tasks may leave some empty.

    Raises:
        InputError: A row cannot be used; the message has its number, counted from 1.
    """
    wanted, group = set(chosen), ((spec.config or {}).get("metadata") or {}).get("group_by")
    with compiling_once():
        for index, row in enumerate(rows):
            if index not in wanted:
                continue
            try:
                written = _render(task, row)
                if group is not None and row[group] is None:
                    raise KeyError(group)
                if spec.config is not None:
                    _require_values(task, row, written)
                    _require_answers(task, row, written)
            except Exception as error:  # templates and functions raise errors of many kinds
                # The functions of a task may turn the rows of a file into other items.
                unit = "row" if getattr(task.config, "process_docs", None) is None else "item"
                raise InputError(no_column(spec, error, f"{unit} {index + 1}: ")) from error


def no_column(spec: TaskSpec, error: Exception, where: str = "") -> str:
    """The message for a task that cannot use its data.

    Args:
        where: The row, followed by a colon and a space.
    """
    files = ", ".join(spec.files()) or spec.name
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    kind = "" if isinstance(error, _Unusable) else f"{type(error).__name__}: "
    return (
        f"the task {spec.name} cannot use {files}: {where}{kind}{reason}; check that the data has the columns that "
        f"{spec.source} reads"
    )


class _Unusable(ValueError):
    """A row can be read but not evaluated."""


def _render(task: Any, row: Any) -> tuple[Any, Any, Any]:
    choices = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else None
    return task.doc_to_text(row), task.doc_to_target(row), choices


def _require_values(task: Any, row: Any, written: Any) -> None:
    """Requires the columns that a template uses: templates render a missing value, None, as a word."""
    if None not in row.values() or "None" not in str(written):
        return
    _render(task, {key: value for key, value in row.items() if value is not None})


def _require_answers(task: Any, row: Any, written: Any) -> None:
    text, target, choices = written
    if choices is None:
        if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling") and not str(target).strip():
            raise _Unusable("the text to score is empty")
        return
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise _Unusable(f"an answer is empty among {choices}")
    gold = text if isinstance(text, int) else target
    known = {*range(len(choices)), *choices}
    if not all(right in known for right in (gold if isinstance(gold, list) else [gold])):
        raise _Unusable(f"the right answer is {gold!r}, not one of the {len(choices)} choices (counted from 0)")
    if task.config.process_results is not None:
        task.process_results(row, [(-1.0, False)] * len(choices))
