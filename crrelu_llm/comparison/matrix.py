"""The run matrix: every arm × grid point × seed of one recipe, finished runs kept, killed ones resumed."""

import contextlib
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from crrelu_llm.comparison import tuning
from crrelu_llm.comparison.arms import Arm, arm_dir, check_grid, default_baseline, grid_argv, grid_name
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.evaluation.items import evaluate_trainer, texts
from crrelu_llm.files import alone, is_leftover, remove, write_json
from crrelu_llm.patching import find_sites, loading, section
from crrelu_llm.training.arguments import Recipe, parse
from crrelu_llm.training.preflight import check_machine
from crrelu_llm.training.prepare import check_calibrated, datasets_of, starting_checkpoint
from crrelu_llm.training.processes import from_main, main_process_first
from crrelu_llm.training.resume import checkpoint_to_resume
from crrelu_llm.training.run import RUN, train_and_save
from crrelu_llm.training.trainers import build_trainer, require_bitsandbytes

SETTINGS = "comparison.json"
BEFORE = "before.json"
TEXTS = "texts.json"
_SETTINGS_KEYS = {"identity", "kind", "commands", "created", "baseline", "arms", "seeds", "asked", "points", "data"}


class RunsFailed(RuntimeError):
    """Some runs of a comparison failed; the others are on disk."""


@dataclass
class Comparison:
    """What is compared, and where.

    Attributes:
        kind: `"sft"` or `"dpo"`.
        argv: The recipe's own options (`--config R.yaml ...`).
        arms: The arms.
        seeds: One run of every arm for each.
        points: Grid points; a single empty one without a grid.
        baseline: Name of the arm that the others are compared with, where the user chose one.
        output_dir: Where everything goes.
        command: The exact command, for the report.
        keep_models: Whether the trained models are saved.
        tune: Recipe options to try with each arm, of which the best on held-out training rows is taken.
        patched_dir: Where the patched copies are, by arm, to share them with other comparisons; else in `output_dir`.
        tuned: The options that were taken, by arm and grid point.
    """

    kind: str
    argv: list[str]
    arms: list[Arm]
    seeds: list[int]
    points: list[dict[str, str]]
    baseline: str | None
    output_dir: Path
    command: str
    keep_models: bool = True
    tune: list[dict[str, str]] = field(default_factory=list)
    patched_dir: Path | None = None
    tuned: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def recipe(self, arm: Arm, point: dict[str, str], seed: int) -> Recipe:
        """The recipe of one run; arms differ in the activation section only."""
        directory = self.run_dir(arm.name, point, seed)
        chosen = self.tuned.get((arm.name, grid_name(point)), {})
        argv = [*self.argv, *grid_argv(point), *grid_argv(chosen), *arm.argv]
        argv += ["--seed", str(seed), "--output_dir", str(directory)]
        recipe = parse(self.kind, argv)
        if arm.activation is None:
            recipe.activation.activation = None
        if self.kind == "sft" and recipe.training.eval_packing is None:
            recipe.training.eval_packing = False  # so that an item is a document, in every arm the same one
        return recipe

    def run_dir(self, arm: str, point: dict[str, str], seed: int) -> Path:
        """`D/<arm>/seed-<n>`, with the grid point between."""
        return arm_dir(self.output_dir, arm, point) / f"seed-{seed}"

    def patched(self, arm: str, point: dict[str, str]) -> Path:
        """The patched copy that an arm starts from at a grid point."""
        return patched_copy(self.patched_dir or self.output_dir, arm, point)

    def tries(self) -> "Comparison":
        """The comparison of the tries, in a directory of its own, from the same patched copies."""
        return replace(
            self,
            points=[point | attempt for point in self.points for attempt in self.tune],
            seeds=[tuning.SEED],
            output_dir=self.output_dir / tuning.TUNING,
            keep_models=False,
            tune=[],
            patched_dir=self.patched_dir or self.output_dir,
        )


def patched_copy(directory: Path, arm: str, point: dict[str, str]) -> Path:
    """Where the patched copy is; what a run's training alone depends on has no part in its name."""
    earlier = arm_dir(directory, arm, point) / "patched"
    return earlier if earlier.is_dir() else arm_dir(directory, arm, tuning.starting_point(point)) / "patched"


def before_training(directory: Path, arm: str, point: dict[str, str]) -> Path:
    """Where the metrics of an arm before training are."""
    earlier = arm_dir(directory, arm, point) / BEFORE
    return earlier if earlier.is_file() else arm_dir(directory, arm, tuning.starting_point(point)) / BEFORE


def run_comparison(comparison: Comparison) -> None:
    """Runs what is missing. The report is made from the files, by `comparison.results.build_report`.

    Raises:
        InputError: Anything wrong with the recipe, an arm, the grid or the output directory, before any training.
        RunsFailed: Some did; the others are on disk.
        DiskError: The disk is full or read-only; the comparison stops there, and what is finished is kept.
    """
    recipe = _check_everything(comparison)
    _claim(comparison, recipe)
    train, test = datasets_of(recipe, always_test=True)
    held_out = None
    if comparison.tune:
        train, held_out = tuning.hold_out(train, test)
    with contextlib.ExitStack() as held:
        with main_process_first():
            if PartialState().is_main_process:
                held.enter_context(alone(comparison.output_dir, "crrelu compare"))
        _claim(comparison, recipe)  # another call may have begun meanwhile
        _record(comparison, recipe, train, test)
        if comparison.tune:
            _tune(comparison, recipe, train, held_out)
        _run_all(comparison, train, test)


def _tune(comparison: Comparison, recipe: Recipe, train: Any, held_out: Any) -> None:
    """Runs the tries that are missing, and takes the best of each arm and grid point.

    Raises:
        RunsFailed: An arm has no try that ended with a finite loss.
    """
    attempts = comparison.tries()
    _claim(attempts, recipe)
    _record(attempts, recipe, train, held_out)
    _say(f"{len(attempts.points) * len(attempts.arms)} tries on {len(held_out)} held-out training rows")
    with contextlib.suppress(RunsFailed):  # a try may diverge
        _run_all(attempts, train, held_out)
    names = [arm.name for arm in comparison.arms]
    for entry in tuning.read_tries(comparison.output_dir, names, comparison.points, comparison.tune):
        place = (entry["arm"], grid_name(entry["point"]))
        if entry["chosen"] is None:
            what = ", ".join(filter(None, place))
            raise RunsFailed(f"{what}: no try of {', '.join(entry['losses'])} ended with a finite loss")
        comparison.tuned[place] = entry["chosen"]
        _say(f"{', '.join(filter(None, place))}: {grid_name(entry['chosen'])} is the best of the tries")


def _run_all(comparison: Comparison, train: Any, test: Any) -> None:
    """Trains what is missing."""
    todo = [(arm, point, seed) for point in comparison.points for arm in comparison.arms for seed in comparison.seeds]
    failures = []
    with _interrupts() as interrupted:
        for index, (arm, point, seed) in enumerate(todo):
            directory = comparison.run_dir(arm.name, point, seed)
            label = f"[{index + 1}/{len(todo)}] {directory.relative_to(comparison.output_dir)}"
            if from_main(is_done(directory)):
                _discard(comparison, directory)  # the call that made it may have been killed before
                _say(f"{label}: kept")
                continue
            _say(f"{label}: training")
            try:
                _one_run(comparison, arm, point, seed, train, test)
                if interrupted:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_how_to_go_on(comparison, todo)) from None
            except DiskError as error:  # every run after it would fail alike
                raise DiskError(f"{error}; {_how_to_go_on(comparison, todo)}") from error
            except Exception as error:  # one arm that diverges or runs out of memory must not take the others with it
                if isinstance(error, InputError) and index == 0:  # nothing has been trained: the recipe is wrong
                    raise
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if PartialState().num_processes > 1:  # the others are somewhere else in this run: none can go on
                    rank = PartialState().process_index
                    print(f"{label}: process {rank}: {message}; {_how_to_go_on(comparison, todo)}", file=sys.stderr)
                    raise
                failures.append(message)
                _say(f"{label}: {message}")
                if PartialState().is_main_process:
                    write_json(directory / RUN, {"status": "failed", "seed": seed, "error": message})
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if failures:
        raise RunsFailed(f"{len(failures)} of {len(todo)} runs failed; the others are in {comparison.output_dir}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C, also where a destructor has swallowed the KeyboardInterrupt."""
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: Any) -> None:
        pressed.append(True)
        signal.default_int_handler(number, frame)

    def quietly(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            report(unraisable)

    before, report = signal.signal(signal.SIGINT, note), sys.unraisablehook
    sys.unraisablehook = quietly
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = report


def is_done(directory: Path) -> bool:
    """Whether a run is complete: its run.json, written last, says so."""
    path = directory / RUN
    return path.is_file() and json.loads(path.read_text()).get("status") == "done"


def _one_run(comparison: Comparison, arm: Arm, point: dict[str, str], seed: int, train: Any, test: Any) -> None:
    recipe = comparison.recipe(arm, point, seed)
    config = recipe.activation.patch_config()
    model = starting_checkpoint(
        _source(comparison, recipe),
        config,
        comparison.patched(arm.name, point),
        recipe.model.dtype or "float32",
        # The arm of the model as it is shares the recipe with the others.
        trains_affine=recipe.activation.affine_learning_rate > 0 and config is not None,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    trainer = build_trainer(recipe, model, train, test)
    _keep_texts(comparison, trainer)
    before = BeforeTraining(comparison.kind, trainer, before_training(comparison.output_dir, arm.name, point))
    trainer.add_callback(before)
    # A run that goes on has other weights than the first step: without its `before` it starts again.
    newest = checkpoint_to_resume("auto", Path(trainer.args.output_dir)) if from_main(before.path.is_file()) else None
    trainer.args.resume_from_checkpoint = from_main(newest)

    def evaluate(trained: Any) -> dict[str, Any]:
        metrics, items = evaluate_trainer(comparison.kind, trained)
        return {"metrics": metrics, "items": items, "grid": point}

    train_and_save(trainer, recipe, comparison.keep_models, evaluate, lambda: before.seconds)
    for tracker in trainer.accelerator.trackers:  # not end_training(): the next run needs the other processes
        tracker.finish()
    _discard(comparison, Path(trainer.args.output_dir))
    trainer.accelerator.free_memory()


def _keep_texts(comparison: Comparison, trainer: Any) -> None:
    """Keeps what the evaluation items say, once for all runs, for the report's examples."""
    path = comparison.output_dir / TEXTS
    if PartialState().is_main_process and not path.is_file():
        write_json(path, texts(comparison.kind, trainer))


class BeforeTraining(TrainerCallback):
    """Evaluates an arm's starting point once, when the model is wrapped and sharded, before the first step."""

    def __init__(self, kind: str, trainer: Any, path: Path):
        self.kind, self.trainer, self.path = kind, trainer, path
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the metrics, unless another seed of the arm has."""
        if from_main(self.path.is_file()):
            return
        started, logged = time.perf_counter(), len(state.log_history)
        with torch.random.fork_rng():  # the run must be what it is without this evaluation
            metrics, _ = evaluate_trainer(self.kind, self.trainer)
        del state.log_history[logged:]
        if self.trainer.accelerator.is_main_process:
            write_json(self.path, metrics)
        self.seconds = time.perf_counter() - started


def _discard(comparison: Comparison, directory: Path) -> None:
    """Removes the checkpoints of a finished run where models are not wanted."""
    if not comparison.keep_models and PartialState().is_main_process:
        for saved in directory.glob("checkpoint-*"):
            remove(saved)


def _how_to_go_on(comparison: Comparison, todo: list[tuple[Arm, dict[str, str], int]]) -> str:
    done = sum(is_done(comparison.run_dir(arm.name, point, seed)) for arm, point, seed in todo)
    return f"{done} of {len(todo)} runs are finished and kept; run the same command again to go on"


def _source(comparison: Comparison, recipe: Recipe) -> str:
    """The MODEL every arm starts from; a GGUF file is converted once for all of them."""
    model = str(recipe.model.model_name_or_path)
    if not loading.is_gguf(model):
        return model
    converted = comparison.output_dir / "converted" / Path(model).stem
    return starting_checkpoint(model, None, converted, recipe.model.dtype or "float32")


def _check_everything(comparison: Comparison) -> Recipe:
    """Parses every arm's recipe before the first run is started; returns the recipe that they share."""
    base = parse(comparison.kind, comparison.argv)
    model = str(base.model.model_name_or_path)
    points = comparison.tries().points if comparison.tune else comparison.points
    check_grid(points, comparison.arms)
    if comparison.tune and (both := comparison.points[0].keys() & comparison.tune[0].keys()):
        raise InputError(f"--tune {min(both)}=…: --grid sets this key too; leave one of them out")
    for point in points:
        for arm in comparison.arms:
            recipe = comparison.recipe(arm, point, comparison.seeds[0])
            config = recipe.activation.patch_config(f"{recipe.source}: ")
            if config is not None and recipe.activation.affine_learning_rate > 0:
                check_calibrated(f"the arm {arm.name}", config, None)
            require_bitsandbytes(recipe)
    check_machine(base)
    skeleton = loading.skeleton(model, trust_remote_code=base.training.trust_remote_code)
    found = section.read(skeleton.config)
    if found is not None:
        raise InputError(f"{model} is already patched to {found['activation']}; compare from the original checkpoint")
    find_sites(skeleton)
    return base


def _claim(comparison: Comparison, recipe: Recipe) -> None:
    """Refuses a directory that holds anything but this comparison."""
    directory = comparison.output_dir
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir {directory} is a file; choose a directory")
    if not directory.exists() or all(is_leftover(path) for path in directory.iterdir()):
        return
    found = read_settings(directory)
    wanted = _identity(comparison, recipe)
    if found["identity"] != wanted:
        old, new = found["identity"], wanted
        differs = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise InputError(
            f"{directory} already holds another comparison (different: {', '.join(differs)}); choose another"
        )


def _record(comparison: Comparison, recipe: Recipe, train: Any, test: Any) -> None:
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
            f"{directory}: the data has changed since this comparison was begun; choose another output_dir"
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
    """comparison.json of a directory.

    Raises:
        InputError: There is none.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(f"{directory} holds no comparison (no {SETTINGS}); choose a new or empty directory")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to begin the comparison anew") from error
    if not isinstance(settings, dict) or not settings.keys() >= _SETTINGS_KEYS:
        raise InputError(f"{path} is not one that this version of crrelu_llm wrote; choose another directory")
    return settings


def _identity(comparison: Comparison, recipe: Recipe) -> dict[str, Any]:
    """What two calls must share to be the same comparison: everything but arms, seeds and grid."""
    values = {key: value for key, value in recipe.values.items() if key not in ("seed", "output_dir")}
    hidden = {} if recipe.hidden is None else {"hidden": recipe.hidden}
    tuned = {"tune": comparison.tune} if comparison.tune else {}
    return json.loads(json.dumps({"trainer": comparison.kind, **values, **hidden, **tuned}, default=str))


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    return old + [value for value in new if value not in old]


def _say(message: str) -> None:
    if PartialState().is_main_process:
        print(message, file=sys.stderr, flush=True)
