"""Builds the report of a comparison from its files: arms, runs, paired comparisons."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.comparison import tuning
from crrelu_llm.comparison.arms import arm_dir, grid_name, number, parse_arm
from crrelu_llm.comparison.definition import BEFORE, before_training, patched_copy
from crrelu_llm.comparison.matrix import TEXTS
from crrelu_llm.comparison.settings import SETTINGS, Settings, read_settings
from crrelu_llm.comparison.trajectories import trajectories
from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.measured import WEIGHTS, ItemText, linearised, shares_of
from crrelu_llm.patching.transform import read_report
from crrelu_llm.report.schema import Arm, Grid, Headline, Metric, Report, Run, Tuning
from crrelu_llm.statistics import single_items
from crrelu_llm.statistics.paired import Comparison, Unit, adjust, compare_metric
from crrelu_llm.statistics.single_items import About, Change, Example, Option, Shown
from crrelu_llm.training.kinds import KINDS, kind_of
from crrelu_llm.training.run import RUN

NOT_RUN = "not run yet"
_REMEDY = "remove it, and run the comparison again"
UNITS: tuple[Unit, ...] = ("seed", "item", "both")
# Metrics whose items are right or wrong.
_RIGHT_OR_WRONG = ("reward_accuracy", "answer_accuracy", "accuracy", "top5_accuracy")
# The largest negligible differences: 0.01 nats of loss, and so 1 % of perplexity (as a share of the baseline's), and
# one point of an accuracy. A reward margin has no natural scale.
MARGINS = {"loss": 0.01, "perplexity": 0.01, "token_accuracy": 0.01} | dict.fromkeys(_RIGHT_OR_WRONG, 0.01)
# The fields of run.json that the report takes, with their values if they are missing.
_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("status", "error", "train_seconds", "steps", "tokens_per_second", "peak_memory_bytes")),
    **{"metrics": {}, "epsilon": {}, "epsilon_start": {}, "curves": {}, "history": [], "sparsity": {}},
}


@dataclass
class Outcome:
    """The results of a run: its part of the report, its value for every item, and its environment."""

    run: Run
    items: dict[str, list[float]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


Outcomes = dict[tuple[str, str, int], Outcome]  # by arm, name of the grid point and seed
Pairs = list[tuple[Outcome, Outcome]]  # of baseline and candidate, one a seed


def build_report(directory: Path, margins: dict[str, float] | None = None) -> Report:
    """Builds the report of a comparison from its files; missing and failed runs are listed as such.

    Args:
        directory: The directory of the comparison.
        margins: The largest negligible difference of some metrics, in each metric's unit; `MARGINS` for the others.

    Raises:
        InputError: The directory has no comparison, or the comparison lacks a metric that `margins` names.
    """
    from crrelu_llm.evaluation.metrics import METRICS

    settings = read_settings(directory)
    if settings.kind not in KINDS:
        raise InputError(f"{directory / SETTINGS}: unknown kind of training {settings.kind!r}; use {', '.join(KINDS)}")
    kind = kind_of(settings.kind)
    runs = {
        (arm, grid_name(point), seed): _read_run(directory, arm, point, seed)
        for arm in settings.arms
        for point in settings.points
        for seed in settings.seeds
        if [arm, grid_name(point), seed] in settings.asked
    }
    finished = [outcome for outcome in runs.values() if outcome.run.done]
    _share_weights(runs)
    names = [name for name in METRICS if any(name in outcome.run.metrics for outcome in finished)]
    about = ("label", "higher_is_better", "format", "reference")
    metrics = {name: Metric.of(dict(zip(about, METRICS[name], strict=True))) for name in names}
    margins = margins or {}
    for name in margins.keys() - metrics.keys():
        known = ", ".join(metrics) or "none yet"
        raise InputError(f"--margin {name}: {directory} has no such metric; it has: {known}")
    with reading(str(directory / TEXTS), "remove it; the report then shows no examples", ours=True):
        texts = [ItemText.of(text) for text in _read_json(directory / TEXTS) or []]
    changes, examples = _single_items(kind.headline, settings, runs, metrics, texts)
    blocks = settings.recipe.get("packing_strategy") == "wrapped" and settings.recipe.get(
        "eval_packing", settings.recipe.get("packing")
    )
    pairs = [
        (name, grid, [(before.run, after.run) for before, after in found])
        for name, grid, found in _pairs(settings, runs)
    ]
    return Report(
        schema_version=1,
        title=f"{_model_name(settings)}: {' against '.join(settings.arms)}",
        command="\n".join(settings.commands),
        created=settings.created,
        trainer=settings.kind,
        trainer_label=kind.label,
        items="blocks of text" if blocks else kind.items,
        recipe=settings.recipe,
        environment=_environment([outcome.environment for outcome in finished]),
        arms=[_arm(directory, name, settings, runs) for name in settings.arms],
        comparisons=compare_runs(settings, runs, metrics, margins),
        changes=changes,
        examples=examples,
        data=settings.data,
        baseline=settings.baseline,
        headline=Headline(metric=kind.headline, higher_is_better=METRICS[kind.headline][1]),
        metrics=metrics,
        tuning=_tuning(directory, settings, kind.headline, METRICS[kind.headline][1]),
        trajectories=trajectories(pairs, settings.baseline, *kind.logged),
        trajectory=Headline(metric=kind.logged[0].removeprefix("eval_"), higher_is_better=kind.logged[1]),
    )


def _share_weights(runs: Outcomes) -> None:
    """Gives the items' weights, which are the rows' at a grid point, to runs from before they were saved."""
    known = {point: one.items[WEIGHTS] for (_, point, _), one in runs.items() if WEIGHTS in one.items}
    for (_, point, _), one in runs.items():
        if point in known and len(one.items.get("loss", ())) == len(known[point]):
            one.items.setdefault(WEIGHTS, known[point])


def _environment(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the runs were made; if they differ in an entry, with all its values."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one[key] for one in every if key in one]
        if all(isinstance(value, dict) for value in values):
            merged[key] = _environment(values)
        else:
            distinct = list(dict.fromkeys(map(str, values)))
            merged[key] = values[0] if len(distinct) == 1 else " or ".join(distinct)
    return merged


def _tuning(directory: Path, settings: Settings, metric: str, higher_is_better: bool) -> Tuning | None:
    """The tries of each arm, and the chosen options; None without tuning."""
    if not settings.tune:
        return None
    arms, points = settings.arms, settings.points
    tries = tuning.read_tries(directory, arms, points, settings.tune, metric, higher_is_better)
    begun = (directory / tuning.TUNING / SETTINGS).is_file()
    kept = read_settings(directory / tuning.TUNING).data if begun else []
    rows = next((entry.rows for entry in reversed(kept)), None)
    return Tuning(metric=metric, seed=tuning.SEED, rows=rows, tries=[entry for _, entry in tries])


def _read_run(directory: Path, arm: str, point: dict[str, str], seed: int) -> Outcome:
    place = arm_dir(directory, arm, point)
    path = place / f"seed-{seed}" / RUN
    run: dict[str, Any] = _read_json(path) or {"status": "failed", "error": NOT_RUN}
    own = _read_json(place / f"seed-{seed}" / BEFORE)  # if the run started from its own model
    before = own or _read_json(before_training(directory, arm, point)) or {}
    begun = {"seed": seed, "grid": _grid(point), "sparsity_before": before.pop("sparsity", {}), "before": before}
    with reading(str(path), _REMEDY, ours=True):
        part = Run.of(_EMPTY | {name: value for name, value in run.items() if name in _EMPTY} | begun)
        items = {name: np.array(values, dtype=float).tolist() for name, values in run.get("items", {}).items()}
    return Outcome(part, items, run.get("environment", {}))


def _grid(point: dict[str, str]) -> Grid:
    return {key: number(value) for key, value in point.items()}


def _arm(directory: Path, name: str, settings: Settings, runs: Outcomes) -> Arm:
    arm = parse_arm(name)
    own = [outcome.run for (other, _, _), outcome in runs.items() if other == name]
    copies = [directory, *([Path(settings.patched_dir)] if settings.patched_dir else [])]
    places = [patched_copy(copy, name, point) for copy in copies for point in settings.points]
    places += [
        arm_dir(directory, name, point) / f"seed-{seed}" / "patched"  # if each seed starts from its own model
        for point in settings.points
        for seed in settings.seeds
    ]
    patches = map(read_report, places)
    return Arm(
        arm=name,
        activation=arm.activation or "native",
        options=dict(arm.options),
        patch=next((patch for patch in patches if patch), None),
        before=next((run.before for run in own if run.before), {}),
        runs=own,
    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    with reading(str(path), _REMEDY):
        return json.loads(path.read_text())


def compare_runs(
    settings: Settings, runs: Outcomes, metrics: dict[str, Metric], margins: dict[str, float]
) -> list[Comparison]:
    """All paired comparisons with the baseline, by seed, by item and by both, corrected for their number.

    Args:
        settings: The settings of the comparison.
        runs: The results of each run. A pair needs two finished runs.
        metrics: The direction of each metric, and whether it is a reference; references are not compared.
        margins: The largest negligible difference of some metrics, in each metric's unit.
    """
    baseline = settings.baseline
    found = []
    for candidate, grid, pairs in _pairs(settings, runs):
        for metric, about in metrics.items():
            if about.reference:
                continue
            for unit in UNITS:
                entry = _compare(metric, about, pairs, unit, (baseline, candidate), margins)
                if entry is not None:
                    found.append(entry.but(grid=grid))
    return adjust(found)


def _pairs(settings: Settings, runs: Outcomes) -> Iterator[tuple[str, Grid, Pairs]]:
    """Yields candidate, grid values, and the runs of baseline and candidate for every seed that finished in both."""
    baseline = settings.baseline
    for point in settings.points:
        for candidate in (arm for arm in settings.arms if arm != baseline):
            places = [[(arm, grid_name(point), seed) for arm in (baseline, candidate)] for seed in settings.seeds]
            pairs = [
                (runs[before], runs[after])
                for before, after in places
                if all(place in runs and runs[place].run.done for place in (before, after))
            ]
            if pairs:
                yield candidate, _grid(point), pairs


def _single_items(
    headline: str, settings: Settings, runs: Outcomes, metrics: dict[str, Metric], texts: list[ItemText]
) -> tuple[list[Change], list[Example]]:
    """The changes of the headline metric by item, averaged over seeds, for each candidate, and the largest of them."""
    changes: list[Change] = []
    examples: list[Example] = []
    if headline not in metrics:
        return changes, examples
    metric = metrics[headline]
    for candidate, grid, pairs in _pairs(settings, runs):
        tables = _items(headline, pairs)
        if tables is None or not all(np.isfinite(table).all() for table in tables):
            continue
        about = About(
            metric=headline,
            label=metric.label,
            higher_is_better=metric.higher_is_better,
            format=metric.format,
            grid=grid,
            baseline=settings.baseline,
            candidate=candidate,
        )
        columns = [table.mean(axis=0).tolist() for table in tables]
        changes.append(single_items.changes(about, columns[0], columns[1]))
        if len(texts) != len(columns[0]):
            continue
        for i in single_items.most_changed(about, columns[0], columns[1]):
            options = [
                Option(text=text, right=right, baseline=None, candidate=None)
                for text, right in zip(texts[i].options, texts[i].right, strict=False)
            ]
            shown = Shown(group="", prompt=texts[i].prompt, target="", options=options)
            examples.append(single_items.example(about, i, (columns[0][i], columns[1][i]), shown))
    return changes, examples


def _compare(
    metric: str, about: Metric, pairs: Pairs, unit: Unit, names: tuple[str, str], margins: dict[str, float]
) -> Comparison | None:
    columns: list[Any]
    shares: Any = None
    if unit == "seed":
        columns = [[one.run.metrics.get(metric, math.nan) for one in side] for side in zip(*pairs, strict=True)]
    else:
        tables, shares = _weighted(metric, pairs)
        if tables is None or (unit == "both" and len(pairs) < 2):
            return None
        columns = tables
        if unit == "item":
            # The value of an item is its mean over the seeds: the items of several runs are not more data.
            columns = [table.mean(axis=0) for table in tables]
            shares = [table.mean(axis=0) for table in shares] if shares else None
    return compare_metric(
        metric,
        about.higher_is_better,
        columns[0],
        columns[1],
        unit,
        metric in _RIGHT_OR_WRONG,
        baseline_name=names[0],
        candidate_name=names[1],
        margin=margins.get(metric, _margin(metric, pairs)),
        shares=shares if unit == "item" else None,
    )


def _items(metric: str, pairs: Pairs) -> list[np.ndarray] | None:
    """The values of the items for baseline and candidate, each `(seeds, items)`; None if a run lacks them."""
    if not all(metric in one.items for pair in pairs for one in pair):
        return None
    if len({len(one.items[metric]) for pair in pairs for one in pair}) > 1:
        return None  # different evaluation data: the items cannot be paired
    return [np.array([one.items[metric] for one in side], dtype=float) for side in zip(*pairs, strict=True)]


def _weighted(metric: str, pairs: Pairs) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None]:
    """Values of the items whose mean is the metric, and their shares in it: a long document counts by its tokens."""
    tables, weights = _items(metric, pairs), _items(WEIGHTS, pairs)
    if tables is None or weights is None or not all(np.isfinite(table).all() for table in tables):
        return tables, None
    sides = [list(zip(table * own, own, strict=True)) for table, own in zip(tables, weights, strict=True)]
    values, shares = ([np.array([form(*row) for row in side]) for side in sides] for form in (linearised, shares_of))
    return values, shares


def _margin(metric: str, pairs: Pairs) -> float | None:
    """The default margin of a metric, in its unit."""
    margin = MARGINS.get(metric)
    if metric != "perplexity" or margin is None:
        return margin
    values = [before.run.metrics.get(metric) for before, _ in pairs]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return margin * float(np.mean(finite)) if finite else None


def _model_name(settings: Settings) -> str:
    recipe = settings.recipe
    drawn = recipe.get("model_config")
    if recipe.get("model_name_or_path") is None and isinstance(drawn, dict):
        return f"{drawn.get('model_type')} from scratch"
    return Path(str(recipe.get("model_name_or_path") or drawn)).name
