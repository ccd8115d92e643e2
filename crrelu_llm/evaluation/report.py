"""From the files of an evaluation to the report: models as arms, paired comparisons over the items of each task."""

from pathlib import Path

import numpy as np

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.contrast import contrast, shown
from crrelu_llm.evaluation.measured import PRIMARY, describe_metric
from crrelu_llm.evaluation.preference import against_reference
from crrelu_llm.evaluation.results import MODEL, Result, Settings, read_model, read_result, read_settings
from crrelu_llm.report.schema import Arm, Headline, Metric, Report, Run, Sparsity
from crrelu_llm.statistics import single_items
from crrelu_llm.statistics.paired import Comparison, adjust, compare_metric
from crrelu_llm.statistics.single_items import About, Change, Example

# Shown beside the results as a control and not compared, because it is the same for every model.
_REFERENCES = ("longer_answer_accuracy",)
# The largest negligible difference: one point of an accuracy, 0.01 nats of a loss, 0.01 bits of a byte.
# Margins and rewards have no scale of their own.
MARGINS = dict.fromkeys(
    ("acc", "acc_norm", "exact_match", "logp_accuracy", "logp_accuracy_norm", "reward_accuracy", "loss"), 0.01
) | {"bits_per_byte": 0.01}

Results = dict[str, dict[str, Result]]  # by model and task


def build_report(directory: Path, margins: dict[str, float] | None = None) -> Report:
    """The report of an evaluation, from its files; the report names the tasks that failed or are missing.

    A metric is called `task/metric`. An arm is a model, with one run.

    Args:
        directory: The directory of the evaluation.
        margins: The largest difference that counts as none, by metric (`task/metric`), in the unit of the metric; for
            the other metrics, `MARGINS`.

    Raises:
        InputError: The directory holds no evaluation, or lacks a metric that `margins` names.
    """
    settings = read_settings(directory)
    results = {model: _results(directory, model, settings) for model in settings.models}
    _add_rewards(results, settings)
    metrics = _metrics(results, settings)
    margins = margins or {}
    for name in margins.keys() - metrics.keys():
        raise InputError(
            f"--margin {name}: {directory} has no such metric; it has: {', '.join(metrics) or 'none yet'}"
        )
    changes, examples = _single_items(results, settings)
    keys: tuple[str, ...] = ("suite", "limit", "chat_template", "dtype", "batch_size", "max_length", "models", "tasks")
    keys += ("reference", "beta") if settings.reference else ()
    return Report(
        schema_version=1,
        title=f"{settings.suite}: {' against '.join(settings.models)}",
        command=settings.command,
        created=settings.created,
        trainer="eval",
        recipe={key: getattr(settings, key) for key in keys},
        environment=settings.environment,
        arms=[_arm(directory, model, results[model], settings) for model in settings.models],
        comparisons=_comparisons(results, metrics, settings, margins),
        changes=changes,
        examples=examples,
        data=settings.data,
        baseline=settings.baseline,
        headline=Headline(metrics=_primaries(results, settings)),
        metrics=metrics,
        notes=_notes(results, settings),
    )


def _results(directory: Path, model: str, settings: Settings) -> dict[str, Result]:
    """The results of a model by task, except those that failed or are missing."""
    names, failed = settings.results[model], settings.failures.get(model, {})
    found = {task: read_result(directory / names[task]) for task in settings.tasks if task not in failed}
    return {task: result for task, result in found.items() if result is not None}


def _add_rewards(results: Results, settings: Settings) -> None:
    """Adds rewards relative to the reference model to all results of pairs except its own, whose rewards are 0."""
    if settings.reference is None:
        return
    base = results[settings.reference]
    for model, tasks in results.items():
        for task, result in tasks.items():
            if model != settings.reference and task in base and "logp_accuracy" in result.items:
                rewards = against_reference(result, base[task], settings.beta)
                tasks[task] = result.but(
                    metrics=rewards.metrics | result.metrics,
                    items=rewards.items | result.items,
                    intervals=rewards.intervals | result.intervals,
                )


def _metrics(results: Results, settings: Settings) -> dict[str, Metric]:
    """The label, direction and format of every metric, in the order of the tasks."""
    described = {}
    for task in settings.tasks:
        for result in (tasks[task] for tasks in results.values() if task in tasks):
            for metric in result.metrics:
                base, comma, variant = metric.partition(",")
                label, better, pattern = describe_metric(base)
                described[f"{task}/{metric}"] = Metric(
                    label=f"{task}: {label}" + (f" ({variant})" if comma else ""),
                    higher_is_better=result.higher_is_better.get(metric, better),
                    format=pattern,
                    reference=base in _REFERENCES,
                )
    return described


def _arm(directory: Path, model: str, tasks: dict[str, Result], settings: Settings) -> Arm:
    about = read_model(directory / settings.results[model][MODEL])
    failed = settings.failures.get(model, {})
    missing = [task for task in settings.tasks if task not in tasks and task not in failed]
    errors = [f"{task}: {error}" for task, error in failed.items()] + [f"{task}: not run yet" for task in missing]
    run = Run(
        seed=0,
        status="failed" if errors else "done",
        error="; ".join(errors) or None,
        metrics={f"{task}/{name}": value for task, one in tasks.items() for name, value in one.metrics.items()},
        intervals={f"{task}/{name}": ends for task, one in tasks.items() for name, ends in one.intervals.items()},
        groups={task: result.groups for task, result in tasks.items() if result.groups},
        items={task: len(result.examples) for task, result in tasks.items()},
        seconds={task: result.seconds for task, result in tasks.items()},
        train_seconds=None,
        tokens_per_second=None,
        peak_memory_bytes=max((result.peak_memory_bytes or 0 for result in tasks.values()), default=0) or None,
        epsilon=about.epsilon if about else {},
        sparsity=next((result.sparsity for result in tasks.values() if result.sparsity.tokens), Sparsity()),
    )
    return Arm(
        arm=model,
        activation=about.activation if about else "unknown",
        model=settings.models[model],
        parameters=about.parameters if about else None,
        runs=[run],
    )


def _comparisons(
    results: Results, metrics: dict[str, Metric], settings: Settings, margins: dict[str, float]
) -> list[Comparison]:
    baseline, primary = settings.baseline, set(_primaries(results, settings).values())
    found = []
    for candidate in (model for model in results if model != baseline):
        for name, about in metrics.items():
            task, _, metric = name.partition("/")
            sides = [results[model][task] for model in (baseline, candidate) if task in results[model]]
            columns = [np.array(side.items[metric], dtype=float) for side in sides if metric in side.items]
            if about.reference or len(columns) < 2 or not _comparable(metric, sides[0], candidate, settings):
                continue
            shares = [np.array(side.shares[metric], dtype=float) for side in sides if metric in side.shares]
            entry = compare_metric(
                name,
                about.higher_is_better,
                columns[0],
                columns[1],
                "item",
                all(np.isin(column, (0, 1)).all() for column in columns),
                baseline_name=baseline,
                candidate_name=candidate,
                margin=margins.get(name, MARGINS.get(metric.partition(",")[0])),
                shares=(shares[0], shares[1]) if len(shares) == 2 else None,
            )
            found.append(entry.but(primary=name in primary))
    return adjust(found)


def _comparable(metric: str, result: Result, candidate: str, settings: Settings) -> bool:
    """Whether a metric does not depend on the tokenizer, or the candidate's tokenizer is the baseline's."""
    return metric not in result.per_token or settings.tokenizers[candidate] == settings.tokenizers[settings.baseline]


def _single_items(results: Results, settings: Settings) -> tuple[list[Change], list[Example]]:
    """The changes of each task's items from the baseline to each candidate, and the items that changed most."""
    changes: list[Change] = []
    examples: list[Example] = []
    baseline = settings.baseline
    for candidate in (model for model in results if model != baseline):
        for task in settings.tasks:
            sides = [results[model][task] for model in (baseline, candidate) if task in results[model]]
            found = [value for value in map(contrast, _with_common_values(sides)) if value is not None]
            if len({value.metric for value in found}) != 1 or len({len(value.values) for value in found}) != 1:
                continue
            if len(found) < 2 or not _comparable(found[0].metric, sides[0], candidate, settings):
                continue
            about = About(
                metric=f"{task}/{found[0].metric}",
                label=f"{task}: {found[0].label}",
                higher_is_better=found[0].higher_is_better,
                format=found[0].format,
                baseline=baseline,
                candidate=candidate,
            )
            columns, items = [value.values for value in found], [side.examples for side in sides]
            if not np.isfinite(columns).all():  # a task's own metric may be NaN
                continue
            changes.append(single_items.changes(about, columns[0], columns[1]))
            if any(len(side) != len(columns[0]) for side in items):
                continue
            for i in single_items.most_changed(about, columns[0], columns[1]):
                values, look = (columns[0][i], columns[1][i]), shown(items[0][i], items[1][i])
                examples.append(single_items.example(about, i, values, look))
    return changes, examples


def _with_common_values(sides: list[Result]) -> list[Result]:
    """The results with their common metrics and shares: a reference model has no rewards, an older file no shares."""
    return [
        side.but(
            items={key: column for key, column in side.items.items() if all(key in other.items for other in sides)},
            shares={key: column for key, column in side.shares.items() if all(key in other.shares for other in sides)},
        )
        for side in sides
    ]


def _primaries(results: Results, settings: Settings) -> dict[str, str]:
    """The metric of each task that decides the verdict."""
    chosen = {}
    for task in settings.tasks:
        # A reward that only some models have (the reference has none) cannot be compared with the baseline's.
        sides = [tasks[task].items for tasks in results.values() if task in tasks]
        shared = set.intersection(*(set(items) for items in sides)) - set(_REFERENCES) if sides else set()
        names = [name for name in PRIMARY if name in shared] or sorted(shared)
        if names:
            chosen[task] = f"{task}/{names[0]}"
    return chosen


def _notes(results: Results, settings: Settings) -> list[str]:
    notes = [
        f"{model}, {task}: {note}."
        for model, tasks in results.items()
        for task, result in tasks.items()
        for note in result.notes
    ]
    baseline = settings.baseline
    other = [model for model, name in settings.tokenizers.items() if name != settings.tokenizers[baseline]]
    if other:
        notes.append(
            f"The tokenizer of {', '.join(other)} is not that of {baseline}: perplexity and loss per token are shown "
            "but not compared between them; bits per byte and accuracies are compared."
        )
    limit = settings.limit
    if limit is not None:
        many = {task for one in results.values() for task, result in one.items() if len(result.examples) > limit}
        more = f"; of {', '.join(sorted(many))}, which has more subtasks, one item of each subtask" if many else ""
        notes.append(f"At most {limit} items of each task were evaluated{more}.")
    return notes
