"""comparison.json: the settings that all calls of a comparison share, its runs so far, and its data."""

import json
import time
from dataclasses import field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from crrelu_llm.comparison.arms import default_baseline, grid_name
from crrelu_llm.comparison.definition import Comparison
from crrelu_llm.errors import InputError, reading
from crrelu_llm.files import is_leftover, write_json
from crrelu_llm.records import Record
from crrelu_llm.report.schema import Data
from crrelu_llm.training.arguments import Recipe

SETTINGS = "comparison.json"


class Settings(Record):
    """comparison.json.

    Attributes:
        identity: What two calls must have in common to be the same comparison.
        commands: The command lines of all calls so far.
        asked: The runs that were asked for: arm, name of the grid point, seed.
        recipe: The recipe of the last call.
        tune: Recipe options to try with each arm.
        patched_dir: The directory of the patched copies, if it is shared.
    """

    identity: dict[str, Any]
    kind: str
    commands: list[str]
    created: str
    baseline: str
    arms: list[str]
    seeds: list[int]
    asked: list[list[Any]]
    points: list[dict[str, str]]
    recipe: dict[str, Any]
    data: list[Data]
    tune: list[dict[str, str]] = field(default_factory=list)
    patched_dir: str | None = None


def claim(comparison: Comparison, recipe: Recipe) -> None:
    """Refuses a directory that contains anything except this comparison."""
    directory = comparison.output_dir
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir {directory} is a file; choose a directory")
    if not directory.exists() or all(is_leftover(path) for path in directory.iterdir()):
        return
    if not (directory / SETTINGS).is_file():
        raise InputError(f"{directory} has other files, and no comparison; choose a new or empty directory")
    found = read_settings(directory)
    wanted = _identity(comparison, recipe)
    if found.identity != wanted:
        old, new = found.identity, wanted
        differs = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise InputError(
            f"{directory} already holds another comparison (different: {', '.join(differs)}); choose another "
            "output_dir"
        )


def record(comparison: Comparison, recipe: Recipe, train: Any, test: Any) -> None:
    """Writes comparison.json: the runs requested so far, and the hashes of the data.

    Raises:
        InputError: The comparison in the directory was started with other data.
    """
    from crrelu_llm.data import sha256

    names = {"train": recipe.script.dataset_train_split, "test": recipe.script.dataset_test_split}
    data = [
        Data(
            name=str(recipe.script.dataset_name or "datasets"),
            split=names[role],
            rows=len(split),
            sha256=sha256(split),
        )
        for role, split in (("train", train), ("test", test))
        if hasattr(split, "__len__")
    ]
    directory = comparison.output_dir
    old = read_settings(directory) if (directory / SETTINGS).is_file() else None
    if old and old.data != data:
        raise InputError(
            f"{directory}: the data has changed since this comparison was started; choose another output_dir"
        )
    asked = [
        [arm.name, grid_name(point), seed]
        for arm in comparison.arms
        for point in comparison.points
        for seed in comparison.seeds
    ]
    shared: dict[str, Any] = {"tune": comparison.tune} if comparison.tune else {}
    patched_dir = str(comparison.patched_dir.resolve()) if comparison.patched_dir else old and old.patched_dir
    shared |= {"patched_dir": patched_dir} if patched_dir else {}
    settings = Settings(
        identity=_identity(comparison, recipe),
        kind=comparison.kind,
        commands=_union(old, "commands", [comparison.command]),
        created=old.created if old else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        baseline=comparison.baseline or (old.baseline if old else default_baseline(comparison.arms)),
        # A second call may add arms, seeds or grid points to the same recipe.
        arms=_union(old, "arms", [arm.name for arm in comparison.arms]),
        seeds=_union(old, "seeds", comparison.seeds),
        asked=_union(old, "asked", asked),
        points=_union(old, "points", comparison.points),
        recipe=recipe.values,
        data=data,
        **shared,
    )
    if PartialState().is_main_process:
        write_json(directory / SETTINGS, settings.as_dict())
    PartialState().wait_for_everyone()


def read_settings(directory: Path) -> Settings:
    """Reads comparison.json of a directory.

    Raises:
        InputError: The file is missing, damaged, or of another version.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(f"{directory} holds no comparison (no {SETTINGS}); give the output_dir of `crrelu compare`")
    with reading(str(path), "remove the directory to start the comparison again, or choose another", ours=True):
        return Settings.of(json.loads(path.read_text()))


def _identity(comparison: Comparison, recipe: Recipe) -> dict[str, Any]:
    """The settings that identify a comparison: all except arms, seeds and grid."""
    values = {key: value for key, value in recipe.values.items() if key not in ("seed", "output_dir")}
    hidden = {} if recipe.hidden is None else {"hidden": recipe.hidden}
    more: dict[str, Any] = {"tune": comparison.tune} if comparison.tune else {}
    more |= {"after": str(comparison.after.resolve())} if comparison.after else {}
    processes = PartialState().num_processes  # more processes are a larger batch
    more |= {"num_processes": processes} if processes > 1 else {}
    return json.loads(json.dumps({"trainer": comparison.kind, **values, **hidden, **more}, default=str))


def _union(old: Settings | None, name: str, new: list[Any]) -> list[Any]:
    """The values of an earlier call, and the new ones."""
    values = getattr(old, name) if old else []
    return values + [value for value in new if value not in values]
