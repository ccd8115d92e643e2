"""Prepares a training: the starting checkpoint, patched and saved, and the data."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState

from crrelu_llm.errors import InputError, reading
from crrelu_llm.files import remove
from crrelu_llm.patching import PatchConfig, fingerprint, loading, section
from crrelu_llm.patching.transform import origin, patch_checkpoint, progress_dir, read_origin
from crrelu_llm.training import preflight
from crrelu_llm.training.arguments import Recipe
from crrelu_llm.training.kinds import all_kinds
from crrelu_llm.training.processes import main_process_first

logger = logging.getLogger("crrelu_llm")
_SPLIT_SEED = 42  # of the rows that a mixture holds out
_DEFAULTS = SimpleNamespace(dataset_text_field="text")


def starting_checkpoint(
    model: str,
    config: PatchConfig | None,
    directory: Path,
    dtype: str = "float32",
    *,
    trains_affine: bool = False,
    renews: bool = False,
    **options: Any,
) -> str:
    """The path or hub name from which a trainer starts; makes a patched copy in `directory` if necessary.

    Training starts from a path, not from a model in memory, so that everything that loads the model again (above all
    the DPO reference) sees the same activation. An existing copy made from the same files in the same way is reused.
    A model that is already patched to this activation is used unchanged, including ε.

    Args:
        model: A MODEL as the user writes it.
        config: The patch; None trains the model without a patch.
        directory: Where to make the copy.
        dtype: The dtype of the copy.
        trains_affine: Whether scale, shift, gain and offset, which only a calibrated model has, will be trained.
        renews: Whether to replace a copy made from other files or by another version of this package. Otherwise such a
            copy is refused, because runs that started from it could not resume from another.
        **options: `revision`, `trust_remote_code`, `use_safetensors`.

    Raises:
        InputError: The model is already patched to another activation or ε granularity, or would not be calibrated
            despite `trains_affine`, or `directory` holds another copy.
    """
    source = loading.resolve(model)
    if config is None and not loading.is_gguf(source) and not trains_affine:
        return source
    about = {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key)}
    found = section.read(loading.load_config(source, **about))
    if trains_affine:
        check_calibrated(model, config, found)
    if config is not None and found is not None:
        _check_same_patch(model, config, found)
        return source
    if config is None and not loading.is_gguf(source):
        return source
    wanted = origin(model, config, dtype, options.get("revision"), options.get("trust_remote_code"))
    with main_process_first():
        if directory.is_dir() and any(directory.iterdir()):
            _renew(directory, wanted, renews)
        if not directory.is_dir():
            patch_checkpoint(model, config, directory, dtype, **options)
        elif PartialState().is_local_main_process:
            remove(progress_dir(directory))  # left if the call that made the copy was killed just then
    return str(directory.resolve())  # an adapter stores this path, and may be loaded from anywhere


def _renew(directory: Path, wanted: dict[str, Any], renews: bool) -> None:
    """Removes a patched copy of changed files; refuses a copy of another model or with other options."""
    found = read_origin(directory) or {}
    if found == wanted:
        return
    differs = fingerprint.changed(wanted, found)
    asked = ("model", "options", "dtype", "revision")
    if not renews and fingerprint.without_times(found) == fingerprint.without_times(wanted):
        logger.warning(
            "%s was made before %s changed, in time or version only: it is used", directory, ", ".join(differs)
        )
        return
    if not found or not renews or any(wanted.get(key) != found.get(key) for key in asked):
        raise InputError(
            f"{directory} holds another patched checkpoint (different: {', '.join(differs) or 'all'}); remove it or "
            "choose another output_dir"
        )
    if PartialState().is_local_main_process:
        logger.warning("%s was made before %s changed: it is made again", directory, ", ".join(differs))
        remove(directory)


def datasets_of(recipe: Recipe, always_test: bool = False) -> tuple[Any, Any]:
    """The training split and, if the recipe evaluates or `always_test` is set, the evaluation split.

    Raises:
        InputError: The data cannot be read, a split is missing, or the trainer cannot use the columns.
    """
    from crrelu_llm.data import get_split, load_dataset

    script = recipe.script
    with main_process_first():
        if recipe.mixture.datasets:
            data, name = _mixed(recipe), "datasets"
        else:
            name = str(script.dataset_name)
            data = load_dataset(name, script.dataset_config, script.dataset_streaming)
        train = get_split(data, script.dataset_train_split, name)
        evaluated = always_test or recipe.training.eval_strategy != "no"
        test = get_split(data, script.dataset_test_split, name) if evaluated else None
        if test is not None:
            _check_apart(script.dataset_train_split, script.dataset_test_split, data, name)
        for split in (train, test):
            _check_columns(recipe, split, name)
        train, test = (None if split is None else recipe.kind.prepare(split, recipe) for split in (train, test))
        if PartialState().is_local_main_process:
            check = recipe.kind.check_rows or preflight.text_check(recipe)
            check(recipe, train, name)
            if test is not None:
                check(recipe, test, f"{name} ({script.dataset_test_split})")
    return train, test


def _mixed(recipe: Recipe) -> Any:
    """TRL's mixture; its test split has a seed here, so that every process and every call gets the same rows."""
    from trl import get_dataset

    mixture, size = recipe.mixture, recipe.mixture.test_split_size
    if size is not None and mixture.streaming:
        raise InputError(f"{recipe.source}: test_split_size does not go with streaming; leave one of them out")
    with reading(f"{recipe.source}: datasets", "check their paths, splits and columns"):
        data = get_dataset(replace(mixture, test_split_size=None))
    if size is None:
        return data
    with reading(f"{recipe.source}: test_split_size", "give a share between 0 and 1, such as 0.1"):
        return data["train"].train_test_split(test_size=size, seed=_SPLIT_SEED)


def _check_apart(train: str, test: str, data: Any, name: str) -> None:
    """Raises InputError if the evaluation split contains rows of the training split."""
    from crrelu_llm.data.sources import rows_of

    base, other = (split.partition("[")[0] for split in (train, test))
    if base != other:
        return
    if train != test:
        first, second = (rows_of(split, len(data[base])) for split in (train, test))
        if max(first.start, second.start) >= min(first.stop, second.stop):
            return
    raise InputError(
        f'{name}: "{train}" (training) and "{test}" (evaluation) share rows; hold rows out: dataset_train_split '
        f'"{base}[:90%]" and dataset_test_split "{base}[90%:]"'
    )


def _check_same_patch(model: str, config: PatchConfig, found: dict[str, Any]) -> None:
    if found["activation"] != config.activation:
        raise InputError(f"{model} is already patched to {found['activation']}; start from the original checkpoint")
    if config.uses_crrelu and found["epsilon_per"] != config.epsilon_per:
        raise InputError(
            f"{model} is already patched with one epsilon per {found['epsilon_per']}; set epsilon_per to that, or "
            "start from the original checkpoint"
        )
    if config.selects:
        raise InputError(
            f"{model} is already patched, in {len(found['sites'])} sites; leave layers and every out, or start from "
            "the original checkpoint"
        )
    density = found.get("density", "standard")
    if config.uses_crrelu and density != config.density:
        raise InputError(
            f"{model} is already patched with density: {density}; set density to that, or start from the original "
            "checkpoint"
        )
    level = found.get("calibration", "none") if section.is_calibrated(found) else "none"
    logger.warning("%s is already patched to %s: it is trained unchanged, with its ε", model, config.activation)
    if level != config.calibration:
        logger.warning("it has calibration: %s, and calibration: %s is not applied", level, config.calibration)


def check_calibrated(model: str, config: PatchConfig | None, found: dict[str, Any] | None) -> None:
    """Raises InputError if a run that trains scale, shift, gain and offset would start without them.

    Args:
        model: The MODEL, for the message.
        config: The requested patch.
        found: The section of the MODEL's config; None if it is not patched.
    """
    what = "affine_learning_rate trains scale, shift, gain and offset, which calibration sets"
    if found is not None and not section.is_calibrated(found):
        raise InputError(
            f"{what}, but {model} was patched with calibration: none; start from the original checkpoint with "
            "calibration: fit, or leave affine_learning_rate out"
        )
    if found is None and config is None:
        raise InputError(f"{what}, but {model} is not patched; set activation, or leave affine_learning_rate out")
    if found is None and config is not None and not config.fits:
        raise InputError(f"{what}, but calibration is none; set calibration: fit, or leave affine_learning_rate out")


def _check_columns(recipe: Recipe, split: Any, name: str) -> None:
    columns = None if split is None else split.column_names
    if columns is None or recipe.kind.takes(set(columns), recipe.training):
        return  # no evaluation split, a stream with unknown columns, or columns that the trainer takes
    fitting = [kind.name for kind in all_kinds() if kind is not recipe.kind and kind.takes(set(columns), _DEFAULTS)]
    other = f"; crrelu {' or '.join(fitting)} takes these" if fitting else ""
    raise InputError(f"{name}: {recipe.kind.name} needs {recipe.kind.needs}, not {', '.join(columns)}{other}")
