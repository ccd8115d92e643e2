"""One training run: patch, train, save, and run.json."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from crrelu_llm.environment import environment
from crrelu_llm.errors import DiskError
from crrelu_llm.files import alone, write_json
from crrelu_llm.memory import PeakMemory
from crrelu_llm.patching import section
from crrelu_llm.patching.transform import require_space
from crrelu_llm.training.arguments import Recipe, parse
from crrelu_llm.training.curves import curves
from crrelu_llm.training.epsilon import epsilon_means
from crrelu_llm.training.preflight import check_machine, check_model
from crrelu_llm.training.prepare import datasets_of, starting_checkpoint
from crrelu_llm.training.processes import distribution
from crrelu_llm.training.resume import checkpoint_to_resume, how_to_go_on, last_checkpoint
from crrelu_llm.training.saving import save_final_model
from crrelu_llm.training.trainers import build_trainer, require_bitsandbytes

__all__ = ["RUN", "last_checkpoint", "run_recipe", "train_and_save"]
RUN = "run.json"
# Metrics that the Trainer measures only over the steps since a resume.
_SPEEDS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def run_recipe(kind: str, argv: list[str]) -> dict[str, Any]:
    """`crrelu KIND`: trains one recipe into its output_dir; returns the content of run.json.

    Raises:
        InputError: The recipe, its model or its data is wrong; nothing has been trained.
        DiskError: The disk is full or read-only; the message says which checkpoint is safe.
    """
    recipe = parse(kind, argv)
    recipe.activation.require_activation(f"{recipe.source}: ")
    require_bitsandbytes(recipe)
    check_machine(recipe)
    output_dir = Path(recipe.training.output_dir)
    with contextlib.ExitStack() as held:
        if PartialState().is_main_process:
            held.enter_context(alone(output_dir, f"crrelu {kind}"))
        return _run(recipe, output_dir)


def _run(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    recipe.training.resume_from_checkpoint = checkpoint_to_resume(recipe.training.resume_from_checkpoint, output_dir)
    train, test = datasets_of(recipe)
    check_model(recipe)
    use_safetensors = (recipe.training.model_init_kwargs or {}).get("use_safetensors")
    source = str(recipe.model.model_name_or_path)
    if recipe.kind.start is not None:
        source = recipe.kind.start(recipe, train, output_dir / "start")
    model = starting_checkpoint(
        source,
        recipe.activation.patch_config(f"{recipe.source}: "),
        output_dir / "patched",
        recipe.model.dtype or "float32",
        trains_affine=recipe.activation.affine_learning_rate > 0,
        renews=not recipe.training.resume_from_checkpoint,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
        use_safetensors=use_safetensors,
    )
    trainer = build_trainer(recipe, model, train, test)
    if not recipe.model.use_peft and trainer.accelerator.num_processes == 1:
        require_space(trainer.model, output_dir)
    try:
        record = train_and_save(trainer, recipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(output_dir)) from None
    except DiskError as error:
        raise DiskError(f"{error}; {how_to_go_on(output_dir)}") from error
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    trainer.accelerator.end_training()
    return record


def train_and_save(
    trainer: Any,
    recipe: Recipe,
    save_model: bool = True,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    not_training: Callable[[], float] = lambda: 0.0,
) -> dict[str, Any]:
    """Trains, saves the model, measures, and writes run.json last: if run.json exists, the run is complete.

    Args:
        evaluate: Called with the trained trainer; its result is added to the record.
        not_training: Returns, after training, the seconds that a callback spent on something else.
    """
    args = trainer.args
    if trainer.accelerator.is_main_process:
        (Path(args.output_dir) / RUN).unlink(missing_ok=True)
    start = epsilon_means(trainer.model)
    with PeakMemory() as memory:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if save_model:
        save_final_model(trainer)
    history = trainer.state.log_history
    tokens = max((entry["num_tokens"] for entry in history if "num_tokens" in entry), default=0)
    # After a resume the Trainer measures only the remaining steps: no number is better than a wrong one.
    resumed = bool(args.resume_from_checkpoint)
    seconds = None if resumed else result.metrics["train_runtime"] - not_training()
    record = {
        "kind": recipe.kind.name,
        "activation": (section.read(trainer.model.config) or {}).get("activation", "native"),
        "seed": args.seed,
        "status": "done",
        "resumed": resumed,
        "metrics": {
            key: value
            for key, value in history[-1].items()
            if isinstance(value, (int, float)) and not (resumed and key in _SPEEDS)
        },
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds and tokens else None,
        "peak_memory_bytes": memory.bytes,
        "epsilon": epsilon_means(trainer.model),
        "epsilon_start": start,
        "curves": curves(trainer.model),
        "steps": trainer.state.global_step,
        "history": [entry for entry in history if "loss" in entry or "eval_loss" in entry],
        "recipe": recipe.values,
        "environment": environment(trainer.accelerator.num_processes, distribution(trainer.accelerator)),
    }
    if evaluate is not None:
        record |= evaluate(trainer)
    if trainer.accelerator.is_main_process:
        write_json(Path(args.output_dir) / RUN, record)
    trainer.accelerator.wait_for_everyone()
    return record
