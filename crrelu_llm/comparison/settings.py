"""comparison.json: the settings that all calls of a comparison share, its runs so far, and its data."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from crrelu_llm.comparison.arms import default_baseline, grid_name
from crrelu_llm.comparison.definition import Comparison
from crrelu_llm.errors import InputError
from crrelu_llm.files import is_leftover, write_json
from crrelu_llm.training.arguments import Recipe

SETTINGS = "comparison.json"
_KEYS = {"identity", "kind", "commands", "created", "baseline", "arms", "seeds", "asked", "points", "data"}


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
    if found["identity"] != wanted:
        old, new = found["identity"], wanted
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
        {
            "name": str(recipe.script.dataset_name or "datasets"),
            "split": names[role],
            "rows": len(split),
            "sha256": sha256(split),
        }
        for role, split in (("train", train), ("test", test))
        if hasattr(split, "__len__")
    ]
    directory = comparison.output_dir
    old = read_settings(directory) if (directory / SETTINGS).is_file() else {}
    if old and old["data"] != data:
        raise InputError(
            f"{directory}: the data has changed since this comparison was started; choose another output_dir"
        )
    asked = [
        [arm.name, grid_name(point), seed]
        for arm in comparison.arms
        for point in comparison.points
        for seed in comparison.seeds
    ]
    settings = {
        "identity": _identity(comparison, recipe),
        "kind": comparison.kind,
        "commands": _union(old.get("commands", []), [comparison.command]),
        "created": old.get("created") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "baseline": comparison.baseline or old.get("baseline") or default_baseline(comparison.arms),
        # A second call may add arms, seeds or grid points to the same recipe.
        "arms": _union(old.get("arms", []), [arm.name for arm in comparison.arms]),
        "seeds": _union(old.get("seeds", []), comparison.seeds),
        "asked": _union(old.get("asked", []), asked),
        "points": _union(old.get("points", []), comparison.points),
        "recipe": recipe.values,
        "data": data,
        **({"tune": comparison.tune} if comparison.tune else {}),
        **({"patched_dir": str(comparison.patched_dir.resolve())} if comparison.patched_dir else {}),
    }
    if PartialState().is_main_process:
        write_json(directory / SETTINGS, settings)
    PartialState().wait_for_everyone()


def read_settings(directory: Path) -> dict[str, Any]:
    """Reads comparison.json of a directory.

    Raises:
        InputError: The file is missing, damaged, or of another version.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(f"{directory} holds no comparison (no {SETTINGS}); give the output_dir of `crrelu compare`")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to start the comparison again") from error
    if not isinstance(settings, dict) or not settings.keys() >= _KEYS:
        raise InputError(f"{path} was not written by this version of crrelu_llm; choose another directory")
    return settings


def _identity(comparison: Comparison, recipe: Recipe) -> dict[str, Any]:
    """The settings that identify a comparison: all except arms, seeds and grid."""
    values = {key: value for key, value in recipe.values.items() if key not in ("seed", "output_dir")}
    hidden = {} if recipe.hidden is None else {"hidden": recipe.hidden}
    more: dict[str, Any] = {"tune": comparison.tune} if comparison.tune else {}
    more |= {"after": str(comparison.after.resolve())} if comparison.after else {}
    return json.loads(json.dumps({"trainer": comparison.kind, **values, **hidden, **more}, default=str))


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    return old + [value for value in new if value not in old]
