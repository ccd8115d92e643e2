"""One training run: patch, train, save, and run.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crrelu_llm.environment import environment
from crrelu_llm.errors import InputError
from crrelu_llm.files import write_json
from crrelu_llm.training.arguments import Recipe, parse
from crrelu_llm.training.memory import PeakMemory
from crrelu_llm.training.prepare import datasets_of, starting_checkpoint
from crrelu_llm.training.processes import distribution
from crrelu_llm.training.trainers import build_trainer, epsilon_means, require_bitsandbytes

RUN = "run.json"


def run_recipe(kind: str, argv: list[str]) -> dict[str, Any]:
    """`crrelu sft|dpo`: trains one recipe into its output_dir; returns what run.json says.

    Raises:
        InputError: Anything wrong with the recipe, its model or its data; nothing has been trained then.
    """
    recipe = parse(kind, argv)
    recipe.activation.require_activation(f"{recipe.source}: ")
    require_bitsandbytes(recipe)
    output_dir = Path(recipe.training.output_dir)
    if recipe.training.resume_from_checkpoint:
        _check_resumable(recipe)
    train, test = datasets_of(recipe)
    model = starting_checkpoint(
        str(recipe.model.model_name_or_path),
        recipe.activation.patch_config(f"{recipe.source}: "),
        output_dir / "patched",
        recipe.model.dtype or "float32",
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    trainer = build_trainer(recipe, model, train, test)
    try:
        record = train_and_save(trainer, recipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(output_dir)) from None
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    trainer.end()
    return record


def train_and_save(
    trainer: Any,
    recipe: Recipe,
    save_model: bool = True,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    not_training: Callable[[], float] = lambda: 0.0,
) -> dict[str, Any]:
    """Trains, saves the model, measures, and writes run.json last: where it exists, the run is complete.

    Args:
        evaluate: Called with the trained trainer; what it returns is added to the record.
        not_training: Seconds that a callback has used for something else, known after training.
    """
    args = trainer.args
    if trainer.accelerator.is_main_process:
        (Path(args.output_dir) / RUN).unlink(missing_ok=True)
    start = epsilon_means(trainer.model)
    with PeakMemory() as memory:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if save_model:
        if trainer.is_fsdp_enabled:  # whatever the checkpoints are
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(args.output_dir)
    history = trainer.state.log_history
    tokens = max((entry["num_tokens"] for entry in history if "num_tokens" in entry), default=0)
    # After a resume the Trainer times and counts the rest only: no number is better than a wrong one.
    resumed = bool(args.resume_from_checkpoint)
    seconds = None if resumed else result.metrics["train_runtime"] - not_training()
    record = {
        "kind": recipe.kind,
        "activation": recipe.activation.activation or "native",
        "seed": args.seed,
        "status": "done",
        "resumed": resumed,
        "metrics": {key: value for key, value in history[-1].items() if isinstance(value, (int, float))},
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_bytes": memory.bytes,
        "epsilon": epsilon_means(trainer.model),
        "epsilon_start": start,
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


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest whole `checkpoint-N` of a run, or None: one that was being written at a kill does not count."""
    # trainer_state.json is what the Trainer writes last.
    whole = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    numbered = [path for path in whole if path.name.removeprefix("checkpoint-").isdigit()]
    return str(max(numbered, key=lambda path: int(path.name.rpartition("-")[2]))) if numbered else None


def _check_resumable(recipe: Recipe) -> None:
    args = recipe.training
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() == "true":
        args.resume_from_checkpoint = last_checkpoint(Path(args.output_dir))
        if args.resume_from_checkpoint is None:
            raise InputError(f"resume_from_checkpoint: {args.output_dir} has no checkpoint to resume from")
    elif wanted.lower() == "false":
        args.resume_from_checkpoint = None
    elif not (Path(wanted) / "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint: {wanted} is not a whole checkpoint (no trainer_state.json)")


def _how_to_go_on(output_dir: Path) -> str:
    found = last_checkpoint(output_dir)
    if found:
        return f"{found} is safe; add --resume_from_checkpoint {found} to go on"
    return "no checkpoint had been saved yet; run the same command again to start over"
