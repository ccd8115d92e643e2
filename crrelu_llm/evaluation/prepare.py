"""What an evaluation is asked to do, and the checks of its models, tasks and data before the long work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation import models as named
from crrelu_llm.evaluation.harness import HarnessTask, data_path, manager_for
from crrelu_llm.evaluation.language_modelling import TextTask
from crrelu_llm.evaluation.models import NamedModel
from crrelu_llm.evaluation.preference import PreferenceTask
from crrelu_llm.evaluation.suites import TaskSpec

Task = HarnessTask | PreferenceTask | TextTask


@dataclass
class Evaluation:
    """The models, tasks and options of an evaluation.

    Attributes:
        models: The models, with distinct names.
        specs: The tasks.
        output_dir: The directory of the results and the report.
        baseline: The name of the model with which the others are compared.
        reference: The name of the reference model for the rewards of preference tasks.
        beta: DPO's β, for these rewards.
        suite: The name of the suite, for the report.
        data_dir: The directory of local data files.
        limit: The largest number of items of a task.
        chat: Whether to apply the chat template.
        dtype: The dtype to load the models in.
        why_dtype: A line with the reason for the dtype, if it was not the user's choice.
        batch_size: The rows of a batch, or `"auto"`.
        max_length: The longest context in tokens; None for the models' own.
        device: The device to compute on.
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
    why_dtype: str | None = None
    batch_size: int | str = "auto"
    max_length: int | None = None
    device: str = "cpu"
    command: str = ""


def check_models(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The tokenizers and the identities of all models, before any of them is loaded.

    Raises:
        InputError: A model or its tokenizer is missing, damaged or not usable with the options.
    """
    identities = {model.name: named.identity(model) for model in evaluation.models}
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
                    f"--reference {evaluation.reference}: {name} has another tokenizer, so its rewards relative to "
                    "that model have no meaning; choose a reference with the same tokenizer"
                )
    return tokenizers, identities


def prepare_tasks(evaluation: Evaluation, tokenizers: dict[str, Any]) -> list[Task]:
    """The tasks with their data, after a check of the items to evaluate.

    Raises:
        InputError: A data file does not exist, lm-eval does not have a task, or a task cannot use an item.
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
    tasks = [_prepare(spec, evaluation, manager) for spec in evaluation.specs]
    for name, tokenizer in tokenizers.items():
        for task in tasks:
            if isinstance(task, PreferenceTask):
                task.rendered_for(tokenizer, name)
    return tasks


def _prepare(spec: TaskSpec, evaluation: Evaluation, manager: Any) -> Task:
    if spec.kind == "lm_eval":
        return HarnessTask(spec, evaluation.data_dir, evaluation.limit, evaluation.chat, manager)
    source = (spec.config or {})["data"]
    path: Path | str = source
    if evaluation.data_dir is not None and data_path(source, evaluation.data_dir).is_file():
        path = data_path(source, evaluation.data_dir)
    if spec.kind == "preference":
        return PreferenceTask(spec.name, path, evaluation.limit, evaluation.chat)
    return TextTask(spec.name, path, evaluation.limit)
