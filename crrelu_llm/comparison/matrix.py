"""The run matrix: every arm × grid point × seed of one recipe. Finished runs are kept, killed runs are resumed."""

import contextlib
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from crrelu_llm.comparison import tuning
from crrelu_llm.comparison.arms import Arm, check_grid, grid_name
from crrelu_llm.comparison.definition import BEFORE, Comparison, before_training
from crrelu_llm.comparison.progress import Lines
from crrelu_llm.comparison.settings import claim, record
from crrelu_llm.errors import DiskError, InputError, reading
from crrelu_llm.evaluation.metrics import METRICS
from crrelu_llm.evaluation.sparsity import sparsity_of_trainer
from crrelu_llm.files import alone, remove, write_json
from crrelu_llm.patching import find_sites, loading, section
from crrelu_llm.report.text import number
from crrelu_llm.training.arguments import Recipe, parse
from crrelu_llm.training.kinds.kind import Kind
from crrelu_llm.training.preflight import check_machine, check_model
from crrelu_llm.training.prepare import check_calibrated, datasets_of, starting_checkpoint
from crrelu_llm.training.processes import from_main, main_process_first
from crrelu_llm.training.resume import checkpoint_to_resume
from crrelu_llm.training.run import RUN, train_and_save
from crrelu_llm.training.trainers import build_trainer, require_bitsandbytes

TEXTS = "texts.json"


class RunsFailed(RuntimeError):
    """Some runs of a comparison failed; the others are on disk."""


def run_comparison(comparison: Comparison) -> None:
    """Runs the missing runs. `comparison.results.build_report` makes the report from their files.

    Raises:
        InputError: The recipe, an arm, the grid or the output directory is wrong; raised before any training.
        RunsFailed: Some runs failed; the others are on disk.
        DiskError: The disk is full or read-only; the comparison stops, and finished runs are kept.
    """
    recipe = _check_everything(comparison)
    claim(comparison, recipe)
    train, test = datasets_of(recipe, always_test=True)
    held_out = None
    if comparison.tune:
        train, held_out = tuning.hold_out(train, test)
    with contextlib.ExitStack() as held:
        with main_process_first():
            if PartialState().is_main_process:
                held.enter_context(alone(comparison.output_dir, "crrelu compare"))
        claim(comparison, recipe)  # another call may have started in the meantime
        record(comparison, recipe, train, test)
        if comparison.tune:
            _tune(comparison, recipe, train, held_out)
        _run_all(comparison, train, test)


def _tune(comparison: Comparison, recipe: Recipe, train: Any, held_out: Any) -> None:
    """Runs the missing tries, and chooses the best try of each arm and grid point, permanently."""
    attempts = comparison.tries()
    claim(attempts, recipe)
    record(attempts, recipe, train, held_out)
    _say(f"{len(attempts.points) * len(attempts.arms)} tries, evaluated on {len(held_out)} held-out training rows")
    with contextlib.suppress(RunsFailed):  # a try may diverge
        _run_all(attempts, train, held_out)
    names = [arm.name for arm in comparison.arms]
    judged = recipe.kind.headline, METRICS[recipe.kind.headline][1]
    chosen = tuning.read_chosen(comparison.output_dir)
    for point, entry in tuning.read_tries(comparison.output_dir, names, comparison.points, comparison.tune, *judged):
        key = tuning.key_of(entry.arm, point)
        if entry.chosen is None:
            _say(f"{key}: none of {', '.join(entry.values)} gave a finite {judged[0]}")
            continue
        chosen[key] = comparison.tuned[entry.arm, grid_name(point)] = entry.chosen
        _say(f"{key}: {grid_name(entry.chosen)} is the best of the tries")
    if PartialState().is_main_process:
        write_json(comparison.output_dir / tuning.TUNING / tuning.CHOSEN, chosen)


def _run_all(comparison: Comparison, train: Any, test: Any) -> None:
    """Trains the missing runs."""
    todo = [(arm, point, seed) for point in comparison.points for arm in comparison.arms for seed in comparison.seeds]
    failures = []
    lines = Lines(len(todo)) if comparison.calm else None
    closing = contextlib.closing(lines) if lines else contextlib.nullcontext()
    with _interrupts() as interrupted, closing, _imports_frozen():
        for index, (arm, point, seed) in enumerate(todo):
            directory = comparison.run_dir(arm.name, point, seed)
            label = f"[{index + 1}/{len(todo)}] {directory.relative_to(comparison.output_dir)}"
            name = ", ".join([arm.name, *filter(None, [grid_name(point)]), f"seed {seed}"])
            if from_main(is_done(directory)):
                _discard(comparison, directory)  # the call that trained it may have been killed before
                lines.keep(name) if lines else _say(f"{label}: kept")
                continue
            lines.begin(name) if lines else _say(f"{label}: training")
            try:
                if comparison.tune and (arm.name, grid_name(point)) not in comparison.tuned:
                    raise RuntimeError("none of the --tune values gave a finite result")
                _one_run(comparison, arm, point, seed, train, test, lines)
                if interrupted:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_how_to_go_on(comparison, todo)) from None
            except DiskError as error:  # every later run would fail too
                raise DiskError(f"{error}; {_how_to_go_on(comparison, todo)}") from error
            except Exception as error:  # an arm that diverges or runs out of memory must not stop the others
                if isinstance(error, InputError) and index == 0:  # nothing has been trained: the recipe is wrong
                    raise
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if PartialState().num_processes > 1:  # the others wait elsewhere in this run and cannot continue
                    rank = PartialState().process_index
                    print(f"{label}: process {rank}: {message}; {_how_to_go_on(comparison, todo)}", file=sys.stderr)
                    raise
                failures.append(message)
                lines.end(message) if lines else _say(f"{label}: {message}")
                if PartialState().is_main_process:
                    write_json(directory / RUN, {"status": "failed", "seed": seed, "error": message})
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if failures:
        raise RunsFailed(f"{len(failures)} of {len(todo)} runs failed; the others are in {comparison.output_dir}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """Yields a list that is not empty after Ctrl-C, even if a destructor has swallowed the KeyboardInterrupt."""
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


@contextlib.contextmanager
def _imports_frozen() -> Iterator[None]:
    """Keeps imported modules out of garbage collections: a Trainer makes several, of 0.5 s each without this."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_done(directory: Path) -> bool:
    """Whether a run is finished, according to its run.json, which is written last."""
    path = directory / RUN
    with reading(str(path), "remove it, and run the comparison again"):
        return path.is_file() and json.loads(path.read_text()).get("status") == "done"


def _one_run(
    comparison: Comparison, arm: Arm, point: dict[str, str], seed: int, train: Any, test: Any, lines: Lines | None
) -> None:
    recipe = comparison.recipe(arm, point, seed)
    model, own = _start(comparison, recipe, arm, point, seed, train)
    trainer = build_trainer(recipe, model, recipe.kind.drawn(train, seed), test)
    if lines:
        lines.watch(trainer)
    _keep_texts(comparison, recipe.kind, trainer)
    before_path = before_training(comparison.output_dir, arm.name, point)
    if own or recipe.kind.auto_class == loading.CLASSIFIER:  # each seed has its own model or head
        before_path = Path(trainer.args.output_dir) / BEFORE
    before = BeforeTraining(recipe.kind, trainer, before_path)
    trainer.add_callback(before)
    # A resumed run no longer has its starting weights: without before.json, the run starts again.
    newest = checkpoint_to_resume("auto", Path(trainer.args.output_dir)) if from_main(before.path.is_file()) else None
    trainer.args.resume_from_checkpoint = from_main(newest)

    def evaluate(trained: Any) -> dict[str, Any]:
        metrics, items = recipe.kind.evaluate(trained)
        return {"metrics": metrics, "items": items, "grid": point, "sparsity": sparsity_of_trainer(trained).as_dict()}

    record = train_and_save(trainer, recipe, comparison.keep_models, evaluate, lambda: before.seconds)
    if lines:
        value = record["metrics"].get(recipe.kind.headline)
        lines.end(f"{recipe.kind.headline} {number(value)}")
    for tracker in trainer.accelerator.trackers:  # not end_training(): the next run needs the other processes
        tracker.finish()
    _discard(comparison, Path(trainer.args.output_dir))
    trainer.accelerator.free_memory()


def _start(
    comparison: Comparison, recipe: Recipe, arm: Arm, point: dict[str, str], seed: int, train: Any
) -> tuple[str, bool]:
    """The checkpoint that a run starts from, and whether this checkpoint belongs to one seed."""
    trained = comparison.trained_before(arm.name, seed)
    if trained is not None:
        return str(trained.resolve()), True
    config = recipe.activation.patch_config()
    patched, drawn = comparison.patched(arm.name, point), False
    if recipe.kind.start is None:
        source = _source(comparison, recipe)
    else:
        place = comparison.output_dir / "start" / f"seed-{seed}"
        source = recipe.kind.start(recipe, train, place)
        drawn = source == str(place.resolve())
        patched = comparison.run_dir(arm.name, point, seed) / "patched" if drawn else patched
    model = starting_checkpoint(
        source,
        config,
        patched,
        recipe.model.dtype or "float32",
        # The unpatched arm shares the recipe with the others.
        trains_affine=recipe.activation.affine_learning_rate > 0 and config is not None,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    return model, drawn


def _keep_texts(comparison: Comparison, kind: Kind, trainer: Any) -> None:
    """Saves the texts of the evaluation items, once for all runs, for the report's examples."""
    path = comparison.output_dir / TEXTS
    if PartialState().is_main_process and not path.is_file():
        write_json(path, [text.as_dict() for text in kind.texts(trainer)])


class BeforeTraining(TrainerCallback):
    """Evaluates an arm's starting point once, after the model is wrapped and sharded, and before the first step."""

    def __init__(self, kind: Kind, trainer: Any, path: Path):
        self.kind, self.trainer, self.path = kind, trainer, path
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the metrics and the share of zeros, unless another seed of the arm has written them."""
        if from_main(self.path.is_file()):
            return
        started, logged = time.perf_counter(), len(state.log_history)
        with torch.random.fork_rng():  # this evaluation must not change the run
            metrics, _ = self.kind.evaluate(self.trainer)
            sparsity = sparsity_of_trainer(self.trainer).as_dict()
        del state.log_history[logged:]
        if self.trainer.accelerator.is_main_process:
            write_json(self.path, metrics | {"sparsity": sparsity})
        self.seconds = time.perf_counter() - started


def _discard(comparison: Comparison, directory: Path) -> None:
    """Removes the checkpoints of a finished run if models are not kept."""
    if not comparison.keep_models and PartialState().is_main_process:
        for saved in directory.glob("checkpoint-*"):
            remove(saved)


def _how_to_go_on(comparison: Comparison, todo: list[tuple[Arm, dict[str, str], int]]) -> str:
    done = sum(is_done(comparison.run_dir(arm.name, point, seed)) for arm, point, seed in todo)
    return f"{done} of {len(todo)} runs are finished and kept; run the same command again to go on"


def _source(comparison: Comparison, recipe: Recipe) -> str:
    """The model that every arm starts from; a GGUF file is converted once for all arms."""
    model = str(recipe.model.model_name_or_path)
    if not loading.is_gguf(model):
        return model
    converted = (comparison.patched_dir or comparison.output_dir) / "converted" / Path(model).stem
    return starting_checkpoint(model, None, converted, recipe.model.dtype or "float32")


def _check_everything(comparison: Comparison) -> Recipe:
    """Parses every arm's recipe before the first run starts; returns the shared recipe."""
    base = parse(comparison.kind, comparison.argv)
    model = str(base.model.model_name_or_path)
    points = comparison.tries().points if comparison.tune else comparison.points
    if comparison.tune and tuning.SEED in comparison.seeds:
        raise InputError(f"--seeds: {tuning.SEED} is the seed that --tune uses for its tries; choose another")
    check_grid(points, comparison.arms)
    if comparison.tune and (both := comparison.points[0].keys() & comparison.tune[0].keys()):
        raise InputError(f"--tune {min(both)}=…: --grid sets this key too; leave one of them out")
    for point in points:
        for arm in comparison.arms:
            recipe = comparison.recipe(arm, point, comparison.seeds[0])
            if recipe.kind.name == "sft" and recipe.training.shuffle_dataset:
                raise InputError(
                    f"{base.source}: shuffle_dataset gives each seed the evaluation rows in another order, so they "
                    "cannot be paired; leave it out: training rows are shuffled anyway"
                )
            if "num_train_epochs" in point and recipe.training.max_steps > 0:
                option = "--tune" if comparison.tune and "num_train_epochs" in comparison.tune[0] else "--grid"
                raise InputError(f"{option} num_train_epochs=…: no effect beside max_steps; leave one of them out")
            config = recipe.activation.patch_config(f"{recipe.source}: ")
            if config is not None and recipe.activation.affine_learning_rate > 0:
                check_calibrated(f"the arm {arm.name}", config, None)
            require_bitsandbytes(recipe)
    if comparison.patched_dir is not None and comparison.patched_dir.exists() and not comparison.patched_dir.is_dir():
        raise InputError(f"--patched_dir {comparison.patched_dir} is a file; choose a directory")
    for arm in comparison.arms:
        for seed in comparison.seeds:
            _check_trained(comparison.trained_before(arm.name, seed))
    check_machine(base)
    check_model(base)
    if base.kind.skeleton is not None:
        skeleton = base.kind.skeleton(base)
    else:
        skeleton = loading.skeleton(model, trust_remote_code=base.training.trust_remote_code)
    found = section.read(skeleton.config)
    if found is not None:
        raise InputError(f"{model} is already patched to {found['activation']}; compare from the original checkpoint")
    for arm in comparison.arms:
        config = comparison.recipe(arm, points[0], comparison.seeds[0]).activation.patch_config()
        if config is not None:
            with reading(f"the arm {arm.name}", ours=True):
                config.by_layer(len({site.layer for site in find_sites(skeleton, config.parts)}))
    return base


def _check_trained(directory: Path | None) -> None:
    """Raises InputError if the model that a run starts from, by `--after`, is unfinished or was not saved whole."""
    if directory is None:
        return
    if not is_done(directory):
        raise InputError(f"--after: {directory} is not a finished run; use the arms and seeds of that comparison")
    if not (directory / "config.json").is_file():
        raise InputError(
            f"--after: {directory} has no whole model; that comparison must run without --discard_models and adapters"
        )


def _say(message: str) -> None:
    if PartialState().is_main_process:
        print(message, file=sys.stderr, flush=True)
