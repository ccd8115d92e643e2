"""Chooses recipe keys for each arm separately: the same tries for all arms, evaluated on held-out training rows."""

import json
import math
from pathlib import Path
from typing import Any

from crrelu_llm.comparison.arms import arm_dir, grid_name, number, parse_grid
from crrelu_llm.errors import InputError
from crrelu_llm.report.schema import Try
from crrelu_llm.training.run import RUN

TUNING = "tuning"  # the directory of the tries, which are a comparison of their own
CHOSEN = "chosen.json"  # in that directory: the chosen options, which later calls keep
SEED = 1000  # of the tries; no compared run has this seed
_LARGEST_SHARE = 0.2
# Keys that affect neither the model that a run starts from nor its evaluation.
TRAINING_ALONE = frozenset(
    (
        *("learning_rate", "epsilon_learning_rate", "affine_learning_rate", "weight_decay", "epsilon_weight_decay"),
        "activation_l1",
        *("max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "max_grad_norm"),
        *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps"),
        "per_device_train_batch_size",
    )
)


def parse_tune(texts: list[str]) -> list[dict[str, str]]:
    """Parses `["learning_rate=1e-5,1e-4"]` into tries, as recipe options; none without `--tune`.

    Raises:
        InputError: The format is wrong, a key has fewer than two values, or it affects more than the training.
    """
    if not texts:
        return []
    try:
        tries = parse_grid(texts)
    except InputError as error:
        raise InputError(str(error).replace("--grid", "--tune")) from error
    for key in tries[0]:
        if key not in TRAINING_ALONE:
            known = ", ".join(sorted(TRAINING_ALONE))
            raise InputError(f"--tune {key}=…: cannot be tuned; choose from {known}")
        if len({attempt[key] for attempt in tries}) < 2:
            raise InputError(f"--tune {key}=…: give two values or more")
    return tries


def starting_point(point: dict[str, str]) -> dict[str, str]:
    """The part of a grid point that affects the model that a run starts from, or its evaluation."""
    return {key: value for key, value in point.items() if key not in TRAINING_ALONE}


def hold_out(train: Any, test: Any) -> tuple[Any, Any]:
    """Splits the training rows into rows to train on and held-out rows to evaluate the tries.

    As many rows are held out as the test data has, but at most a fifth.

    Raises:
        InputError: The training data is a stream, or has too few rows.
    """
    if not hasattr(train, "train_test_split") or not hasattr(test, "__len__"):
        raise InputError("--tune holds out training rows, which is impossible for streamed data; leave --tune out")
    rows = min(len(test), int(len(train) * _LARGEST_SHARE))
    if rows < 1:
        raise InputError(f"--tune holds out training rows, but there are only {len(train)}; leave --tune out")
    parts = train.train_test_split(test_size=rows, seed=SEED)
    return parts["train"], parts["test"]


def read_tries(
    directory: Path,
    arms: list[str],
    points: list[dict[str, str]],
    tune: list[dict[str, str]],
    metric: str,
    higher_is_better: bool,
) -> list[tuple[dict[str, str], Try]]:
    """Reads the results of the tries, with one entry for each grid point and arm.

    Args:
        directory: The directory of the comparison.
        arms: The names of the arms.
        points: The grid points of the comparison.
        tune: The tries.
        metric: The metric by which the best try is chosen.
        higher_is_better: Whether a larger value is better.
    """
    found, kept = [], read_chosen(directory)
    for point in points:
        grid = {key: number(value) for key, value in point.items()}
        for arm in arms:
            places = {grid_name(one): arm_dir(directory / TUNING, arm, point | one) / f"seed-{SEED}" for one in tune}
            runs = {name: _finished(place / RUN) for name, place in places.items()}
            values = {name: _metric(run, metric) for name, run in runs.items()}
            seconds = {name: run.get("train_seconds") for name, run in runs.items()}
            finite = {name: value for name, value in values.items() if value is not None}
            extreme = max if higher_is_better else min
            best = extreme(finite, key=lambda name: finite[name]) if finite else None
            chosen = kept.get(key_of(arm, point)) or next((one for one in tune if grid_name(one) == best), None)
            edges = [] if chosen is None else _at_edge(chosen, tune)
            attempts = Try(arm=arm, values=values, chosen=chosen, at_edge=edges, grid=grid, train_seconds=seconds)
            found.append((point, attempts))
    return found


def key_of(arm: str, point: dict[str, str]) -> str:
    """The key of an arm at a grid point in `CHOSEN`."""
    return ", ".join(filter(None, (arm, grid_name(point))))


def read_chosen(directory: Path) -> dict[str, dict[str, str]]:
    """Reads the options chosen by earlier calls. They stay, because finished runs were trained with them."""
    path = directory / TUNING / CHOSEN
    return json.loads(path.read_text()) if path.is_file() else {}


def _at_edge(best: dict[str, str], tune: list[dict[str, str]]) -> list[str]:
    edges = []
    for key, value in best.items():
        values = [number(attempt[key]) for attempt in tune]
        if all(isinstance(entry, int | float) for entry in values) and number(value) in (min(values), max(values)):
            edges.append(key)
    return edges


def _finished(path: Path) -> dict[str, Any]:
    """The run.json of a finished try, or an empty dictionary."""
    run = json.loads(path.read_text()) if path.is_file() else {}
    return run if run.get("status") == "done" else {}


def _metric(run: dict[str, Any], name: str) -> float | None:
    value = (run.get("metrics") or {}).get(name)
    return value if value is not None and math.isfinite(value) else None
