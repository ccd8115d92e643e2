"""The types of report.json. A field with a default is only for trained arms or only for evaluations, or is newer."""

import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Self

from crrelu_llm.errors import InputError, reading
from crrelu_llm.records import Record
from crrelu_llm.statistics.paired import Comparison
from crrelu_llm.statistics.single_items import Change, Example

Grid = dict[str, Any]
Values = dict[str, float | None]  # by name; None stands for a number that was not finite
_WRONG = "damaged, or of another version of crrelu_llm: write it again with `crrelu report`"


class Metric(Record):
    """How a metric is shown. A reference is a control beside the results, and is not compared."""

    label: str
    higher_is_better: bool = False
    format: str = "{:.4g}"
    reference: bool = False


class Headline(Record):
    """The main metric and its direction; for an evaluation, `metrics` names one metric for each task."""

    metric: str = "loss"
    higher_is_better: bool = False
    metrics: dict[str, str] = field(default_factory=dict)


class Data(Record):
    """A data set, with the hash that identifies it."""

    name: str
    split: str | None = None
    rows: int
    sha256: str


class Sparsity(Record):
    """By path of a site: the share of exact zeros after it, and of values that equal the offset of their channel."""

    tokens: int = 0
    zeros: dict[str, float] = field(default_factory=dict)
    at_offset: dict[str, float] = field(default_factory=dict)


class Run(Record):
    """One training of an arm, or a model on the tasks of an evaluation.

    Attributes:
        before: The metrics right after the swap.
        metrics: The metrics of the trained model; an evaluation calls them `task/metric`.
        intervals: The intervals over items of an evaluation's metrics.
        groups: The metrics of each group of a task.
        items: The number of items of each task.
        seconds: The time of each task.
        epsilon: The mean ε of each site; `epsilon_start` is the one before training.
        curves: The functions that some sites compute, at points from −4 to 3.
        steps: The optimiser steps of the training.
        history: What the trainer logged.
    """

    seed: int
    status: Literal["done", "failed"]
    error: str | None = None
    grid: Grid = field(default_factory=dict)
    before: Values = field(default_factory=dict)
    metrics: Values
    intervals: dict[str, list[float | None]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    train_seconds: float | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    epsilon: Values = field(default_factory=dict)
    epsilon_start: Values = field(default_factory=dict)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    sparsity: Sparsity = Sparsity()
    sparsity_before: Sparsity = Sparsity()

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return self.status == "done"


class Arm(Record):
    """An arm with its runs; in an evaluation, the model at `model`.

    `patch` is the patch_report.json of the starting point, `before` its metrics.
    """

    arm: str
    activation: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    parameters: int | None = None
    patch: dict[str, Any] | None = None
    before: Values = field(default_factory=dict)
    runs: list[Run]

    @property
    def sites(self) -> list[dict[str, Any]]:
        """The sites in the patch report."""
        return (self.patch or {}).get("sites") or []


class Try(Record):
    """The tries of an arm at grid values.

    `values` has the metric of each try. `chosen` has the best recipe options, or is None if no try gave a finite
    number. `at_edge` names the options whose chosen value is the smallest or the largest one. `train_seconds` is the
    training time of each try.
    """

    arm: str
    values: Values
    chosen: dict[str, str] | None
    at_edge: list[str]
    grid: Grid
    train_seconds: Values = field(default_factory=dict)


class Tuning(Record):
    """The tuning of each arm: the metric, the seed, the number of held-out training rows, and the tries."""

    metric: str
    seed: int
    rows: int | None
    tries: list[Try]


class Point(Record):
    """The paired difference at a step, over `n` seeds."""

    step: int
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


class Trajectory(Record):
    """A candidate's difference from the baseline during training."""

    candidate: str
    grid: Grid
    points: list[Point]


class Report(Record):
    """The report of a comparison or an evaluation. `items` is the word for its items, `verdict` the sentence."""

    schema_version: int
    title: str
    command: str
    created: str
    trainer: str
    trainer_label: str = ""
    items: str = "items"
    recipe: dict[str, Any]
    environment: dict[str, Any]
    arms: list[Arm]
    comparisons: list[Comparison]
    changes: list[Change] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    data: list[Data]
    baseline: str
    headline: Headline
    metrics: dict[str, Metric]
    tuning: Tuning | None = None
    trajectories: list[Trajectory] = field(default_factory=list)
    trajectory: Headline = Headline()
    notes: list[str] = field(default_factory=list)
    verdict: str = ""

    @classmethod
    def read(cls, path: Path, what: str = "") -> Self:
        """Reads a report.json.

        Args:
            path: The path of the file.
            what: The name of the file in messages; by default its path.

        Raises:
            InputError: The file cannot be read, or a field is missing, unknown or of another type.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{what or path}: cannot be read ({error}); give a directory with a report.json"
            ) from None
        with reading(what or str(path), _WRONG, ours=True):
            return cls.of(found)
