"""From the files of an evaluation to the report: models as arms, paired comparisons over the items of each task."""

from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.contrast import contrast, shown
from crrelu_llm.evaluation.measured import KNOWN, PRIMARY
from crrelu_llm.evaluation.preference import against_reference
from crrelu_llm.evaluation.results import MODEL, read_result, read_settings
from crrelu_llm.report.schema import Arm, Data, Headline, Metric, Report, Run, Sparsity
from crrelu_llm.statistics import single_items
from crrelu_llm.statistics.paired import Comparison, adjust, compare_metric
from crrelu_llm.statistics.single_items import About, Change, Example

# Beside the results as a control, not compared: it is the same for every model.
_REFERENCES = ("longer_answer_accuracy",)
# What counts as no difference: a point of an accuracy, 0.01 nats of a loss, 0.01 bits of a byte. Margins and rewards
# have no scale of their own.
MARGINS = dict.fromkeys(
    ("acc", "acc_norm", "exact_match", "logp_accuracy", "logp_accuracy_norm", "reward_accuracy", "loss"), 0.01
) | {"bits_per_byte": 0.01}


def build_report(directory: Path, margins: dict[str, float] | None = None) -> Report:
    """The report of an evaluation, from what is on disk; tasks that failed or are missing are named as such.

    A metric is called `task/metric`. An arm is a model, with one run.

    Args:
        directory: Where the evaluation is.
        margins: What counts as no difference, by metric (`task/metric`), in the metric's unit; of the others,
            `MARGINS`.

    Raises:
        InputError: The directory holds no evaluation, or none of a metric that `margins` names.
    """
    settings = read_settings(directory)
    results = {model: _results(directory, model, settings) for model in settings["models"]}
    if settings["reference"] is not None:
        _add_rewards(results, settings)
    metrics = _describe(results, settings)
    margins = margins or {}
    for name in margins.keys() - metrics.keys():
        raise InputError(
            f"--margin {name}: {directory} has no such metric; it has: {', '.join(metrics) or 'none yet'}"
        )
    changes, examples = _single_items(results, settings)
    keys: tuple[str, ...] = ("suite", "limit", "chat_template", "dtype", "batch_size", "max_length", "models", "tasks")
    keys += ("reference", "beta") if settings["reference"] else ()
    return Report(
        schema_version=1,
        title=f"{settings['suite']}: {' against '.join(settings['models'])}",
        command=settings["command"],
        created=settings["created"],
        trainer="eval",
        recipe={key: settings[key] for key in keys},
        environment=settings["environment"],
        arms=[_arm(directory, model, results[model], settings) for model in settings["models"]],
        comparisons=_comparisons(results, metrics, settings, margins),
        changes=changes,
        examples=examples,
        data=[Data.of(entry) for entry in settings["data"]],
        baseline=settings["baseline"],
        headline=Headline(metrics=_primaries(results, settings)),
        metrics=metrics,
        notes=_notes(results, settings),
    )


def _results(directory: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Results by task, as far as they are there."""
    failed = settings["failures"].get(model, {})
    names = settings["results"][model]
    found = {task: read_result(directory / names[task]) for task in settings["tasks"] if task not in failed}
    return {task: result for task, result in found.items() if result is not None}


def _add_rewards(results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Rewards against the reference model, in each result of pairs but its own, whose rewards are 0."""
    base = results[settings["reference"]]
    for model, tasks in results.items():
        for task, result in tasks.items():
            if model != settings["reference"] and "logp_accuracy" in result["items"] and task in base:
                rewards = against_reference(result, base[task], settings["beta"]).as_dict()
                for part in ("metrics", "items", "intervals"):
                    result[part] = rewards[part] | result[part]


def _describe(results: dict[str, Any], settings: dict[str, Any]) -> dict[str, Metric]:
    """Label, direction and format of every metric, tasks in their order."""
    described = {}
    for task in settings["tasks"]:
        for tasks in results.values():
            result = tasks.get(task) or {"metrics": {}}
            for metric in result["metrics"]:
                base, comma, variant = metric.partition(",")
                label, better, pattern = KNOWN.get(base, (base.replace("_", " "), True, "{:.4f}"))
                described[f"{task}/{metric}"] = Metric(
                    label=f"{task}: {label}" + (f" ({variant})" if comma else ""),
                    higher_is_better=result["higher_is_better"].get(metric, better),
                    format=pattern,
                    reference=base in _REFERENCES,
                )
    return described


def _arm(directory: Path, model: str, tasks: dict[str, Any], settings: dict[str, Any]) -> Arm:
    about = read_result(directory / settings["results"][model][MODEL]) or {}
    failed = settings["failures"].get(model, {})
    missing = [task for task in settings["tasks"] if task not in tasks and task not in failed]
    errors = [f"{task}: {error}" for task, error in failed.items()] + [f"{task}: not run yet" for task in missing]
    values = {
        part: {f"{task}/{metric}": value for task, result in tasks.items() for metric, value in result[part].items()}
        for part in ("metrics", "intervals")
    }
    run = Run(
        seed=0,
        status="failed" if errors else "done",
        error="; ".join(errors) or None,
        metrics=values["metrics"],
        intervals=values["intervals"],
        groups={task: result["groups"] for task, result in tasks.items() if result["groups"]},
        items={task: len(result["examples"]) for task, result in tasks.items()},
        seconds={task: result["seconds"] for task, result in tasks.items()},
        train_seconds=None,
        tokens_per_second=None,
        peak_memory_bytes=max((result.get("peak_memory_bytes") or 0 for result in tasks.values()), default=0) or None,
        epsilon=about.get("epsilon", {}),
        sparsity=Sparsity.of(next((found for result in tasks.values() if (found := result.get("sparsity"))), {})),
    )
    return Arm(
        arm=model,
        activation=about.get("activation", "unknown"),
        model=settings["models"][model],
        parameters=about.get("parameters"),
        runs=[run],
    )


def _comparisons(
    results: dict[str, Any], metrics: dict[str, Metric], settings: dict[str, Any], margins: dict[str, float]
) -> list[Comparison]:
    baseline, primary = settings["baseline"], set(_primaries(results, settings).values())
    found = []
    for candidate in (model for model in results if model != baseline):
        alike = settings["tokenizers"][candidate] == settings["tokenizers"][baseline]
        for name, about in metrics.items():
            task, _, metric = name.partition("/")
            sides = [results[model].get(task) or {} for model in (baseline, candidate)]
            if about.reference or not all(metric in side.get("items", {}) for side in sides):
                continue
            if metric in sides[0]["per_token"] and not alike:
                continue
            columns = [side["items"][metric] for side in sides]
            shares = [side.get("shares", {}).get(metric) for side in sides]
            binary = all(value in (0, 1) for column in columns for value in column)
            entry = compare_metric(
                name,
                about.higher_is_better,
                columns[0],
                columns[1],
                "item",
                binary,
                baseline_name=baseline,
                candidate_name=candidate,
                margin=margins.get(name, MARGINS.get(metric.partition(",")[0])),
                shares=None if None in shares else (shares[0], shares[1]),
            )
            found.append(entry.but(primary=name in primary))
    return adjust(found)


def _single_items(results: dict[str, Any], settings: dict[str, Any]) -> tuple[list[Change], list[Example]]:
    """How the items of each task changed from the baseline to each candidate, and those that changed most."""
    changes: list[Change] = []
    examples: list[Example] = []
    baseline = settings["baseline"]
    alike = {model: name == settings["tokenizers"][baseline] for model, name in settings["tokenizers"].items()}
    for candidate in (model for model in results if model != baseline):
        for task in settings["tasks"]:
            sides = [results[model][task] for model in (baseline, candidate) if task in results[model]]
            found = [value for value in map(contrast, _what_all_have(sides)) if value is not None]
            if len({value.metric for value in found}) != 1 or len({len(value.values) for value in found}) != 1:
                continue
            if len(found) < 2 or (found[0].metric in sides[0]["per_token"] and not alike[candidate]):
                continue
            about = About(
                metric=f"{task}/{found[0].metric}",
                label=f"{task}: {found[0].label}",
                higher_is_better=found[0].higher_is_better,
                format=found[0].format,
                baseline=baseline,
                candidate=candidate,
            )
            columns, looks = [value.values for value in found], [side["examples"] for side in sides]
            if not np.isfinite(np.array(columns, dtype=float)).all():  # as a task's own metric may be
                continue
            changes.append(single_items.changes(about, columns[0], columns[1]))
            if any(len(look) != len(columns[0]) for look in looks):
                continue
            for i in single_items.most_changed(about, columns[0], columns[1]):
                values, look = (columns[0][i], columns[1][i]), shown(looks[0][i], looks[1][i])
                examples.append(single_items.example(about, i, values, look))
    return changes, examples


def _what_all_have(sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the items' values that each has: the reference's has no rewards, an older one no shares."""
    shared = {part: [set(side.get(part, {})) for side in sides] for part in ("items", "shares")}
    return [
        side
        | {
            part: {key: column for key, column in side.get(part, {}).items() if all(key in found for found in keys)}
            for part, keys in shared.items()
        }
        for side in sides
    ]


def _primaries(results: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """The metric of each task that the verdict looks at."""
    chosen = {}
    for task in settings["tasks"]:
        # A reward that only some models have (the reference has none) cannot be compared with the baseline's.
        sides = [tasks[task]["items"] for tasks in results.values() if task in tasks]
        shared = set.intersection(*(set(items) for items in sides)) - set(_REFERENCES) if sides else set()
        names = [name for name in PRIMARY if name in shared] or sorted(shared)
        if names:
            chosen[task] = f"{task}/{names[0]}"
    return chosen


def _notes(results: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    notes = [
        f"{model}, {task}: {note}."
        for model, tasks in results.items()
        for task, result in tasks.items()
        for note in result["notes"]
    ]
    other = [
        model
        for model, tokenizer in settings["tokenizers"].items()
        if tokenizer != settings["tokenizers"][settings["baseline"]]
    ]
    if other:
        notes.append(
            f"The tokenizer of {', '.join(other)} is not that of {settings['baseline']}: perplexity and loss per "
            "token are shown but not compared between them; bits per byte and accuracies are."
        )
    if settings["limit"] is not None:
        more = {
            task
            for tasks in results.values()
            for task, result in tasks.items()
            if len(result["examples"]) > settings["limit"]
        }
        each = f"; of {', '.join(sorted(more))}, which has more subtasks, one of each subtask" if more else ""
        notes.append(f"At most {settings['limit']} items of each task were evaluated{each}.")
    return notes
