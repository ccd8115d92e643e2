"""Atomic checkpoints and final models, and logs that a resumed run continues where they stopped."""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback

from crrelu_llm.errors import reading
from crrelu_llm.files import remove, sync, write_json, writing
from crrelu_llm.training.optimizer import epsilon_modules
from crrelu_llm.training.processes import whole_values
from crrelu_llm.training.resume import ASIDE, FILES, STATE, checkpoints, last_checkpoint, step_of, tidy

logger = logging.getLogger("crrelu_llm")
_SCRATCH = ".saving.tmp"
_MODEL = ".model.tmp"
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


class SavingMixin:
    """A Trainer that names a `checkpoint-N` only when all of its files are on disk.

    transformers writes directly into `checkpoint-N`, so a kill leaves an incomplete checkpoint of that name. Here
    every process writes into a hidden directory instead; when all have finished, the main process writes the list of
    files, waits for the disk, and renames the directory. Only then are older checkpoints deleted (`save_total_limit`).

    A checkpoint also stores the sums since the last log entry, so that the first entry after a resume equals that of
    an uninterrupted run, even if `save_steps` is not a multiple of `logging_steps`.
    """

    args: Any
    state: Any
    control: Any
    model: Any
    accelerator: Any
    _metrics: Any
    _tr_loss: Any
    _globalstep_last_logged: int
    _total_loss_scalar: float
    _total_train_tokens: Any
    _scratch: Path | None = None
    _resumed: bool = False
    _counted_from: int = 0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own method, in a directory without the leftovers of killed writers."""
        self.accelerator.wait_for_everyone()  # another process may still be testing there whether it can save
        if self.accelerator.is_local_main_process:
            tidy(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir)) or True
        elif not resume_from_checkpoint and (earlier := checkpoints(Path(self.args.output_dir))):
            logger.warning(
                "%s holds %s of an earlier run: this run starts from the beginning and overwrites what it reaches",
                self.args.output_dir,
                earlier[0].name,
            )
        self._resumed = bool(resume_from_checkpoint)
        counting = _GoOnCounting(self, resume_from_checkpoint)
        self.add_callback(counting)  # type: ignore[attr-defined]
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.remove_callback(counting)  # type: ignore[attr-defined]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own method, which would train one step too many after a resume from the last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.model.train()  # as after a step: TRL uses the mode to sort its metrics
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Makes the final mean loss cover all steps, or the steps since a resume that found no sums."""
        if self._resumed and "train_loss" in logs:
            steps = self.state.global_step - self._counted_from
            if steps > 0:
                logs["train_loss"] = self._total_loss_scalar / steps
            else:
                del logs["train_loss"]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        """The trainer's own method; a checkpoint of another model or adapter is an InputError."""
        with reading(f"resume_from_checkpoint: {resume_from_checkpoint} is of another model or adapter"):
            if not self._load_renamed(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if not self._load_renamed(Path(self.state.best_model_checkpoint)):
            super()._load_best_model()  # type: ignore[misc]

    def _load_renamed(self, checkpoint: Path) -> bool:
        """Loads a checkpoint whose weights have other names in files than in the model; returns whether it is one.

        transformers saves some families (ViT, Mixtral) under the names of earlier releases. Its Trainer would look for
        the model's names, find none, and silently continue with the present weights.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        if sharded or hasattr(self.model, "peft_config"):
            return False
        own = self.model.state_dict()
        files = list(checkpoint.glob("model*.safetensors"))
        names: set[str] = set()
        for file in files:
            with safe_open(file, "pt") as saved:
                names |= set(saved.keys())
        if names <= own.keys():
            return False
        dtype = next(value.dtype for value in own.values() if value.is_floating_point())
        saved = type(self.model).from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
        self.model.load_state_dict(saved.state_dict())
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._scratch is None else str(self._scratch)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        target = run_dir / f"checkpoint-{self.state.global_step}"
        scratch = run_dir / _SCRATCH
        made = scratch / target.name
        with writing(str(target)):
            try:
                self._scratch = scratch
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                if not self.args.save_only_model:
                    write_json(made / _counts_name(self.args.process_index), self._counts())
                self.accelerator.wait_for_everyone()
                self._publish(made, target)
            finally:
                self._scratch = None
                if self.accelerator.is_local_main_process:
                    remove(scratch)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate(target, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._scratch is None:  # otherwise it is pushed after the rename
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _publish(self, made: Path, target: Path) -> None:
        """Renames a checkpoint that every process has written, and records the name in the trainer's state."""
        step = self.state.best_global_step
        best = target.with_name(f"checkpoint-{step}")
        if step and (best == target or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(made / STATE))
            files = [path for path in sorted(made.rglob("*")) if path.is_file()]
            write_json(made / FILES, {str(path.relative_to(made)): path.stat().st_size for path in files})
            sync(made)
            _rename(made, target)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and made.is_dir():  # a node with its own disk
            _rename(made, target)

    def _counts(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
        }

    def _set_counts(self, counts: dict[str, Any]) -> None:
        self._tr_loss.fill_(_number(counts["loss"]))
        self._globalstep_last_logged = counts["logged"]
        self._total_loss_scalar = _number(counts["total_loss"])
        self._total_train_tokens = counts["tokens"]
        for name, values in counts["metrics"].items():
            self._metrics["train"][name] = [_number(value) for value in values]


class _GoOnCounting(TrainerCallback):
    """Restores the sums of a checkpoint after the Trainer has set them to 0."""

    def __init__(self, trainer: Any, checkpoint: Any):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads this process's sums; a checkpoint of plain TRL, or of fewer processes, has none."""
        path = Path(str(self.checkpoint)) / _counts_name(args.process_index)
        if self.checkpoint and path.is_file():
            self.trainer._counted_from = 0
            self.trainer._set_counts(json.loads(path.read_text(encoding="utf-8")))
        else:
            self.trainer._counted_from = state.global_step


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints until `limit` are left, but never the newest or the best one.

    Checkpoints with a greater number than the newest belong to an earlier run and count as the oldest.
    """
    found = checkpoints(newest.parent)
    kept = {newest.name, Path(best).name} if best else {newest.name}
    order = sorted(found, key=lambda path: (step_of(path) <= step_of(newest), step_of(path)))
    spare = [path for path in order if path.name not in kept]
    for path in spare[: max(0, len(found) - limit)] if limit and limit > 0 else ():
        remove(path)


def save_final_model(trainer: Any) -> None:
    """Writes the trained model into `output_dir`, each file atomically.

    Raises:
        DiskError: The disk is full or read-only.
    """
    target = Path(trainer.args.output_dir)
    made = target / _MODEL
    learned = learned_epsilons(trainer.model)  # every process must call this
    with writing(f"the trained model in {target}"):
        try:
            if trainer.args.should_save and (target / "README.md").is_file():  # PEFT completes it
                made.mkdir(parents=True, exist_ok=True)
                shutil.copy(target / "README.md", made)
            if trainer.is_fsdp_enabled:  # the model is saved whole, even if checkpoints are sharded
                trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(str(made), _internal_call=True)  # else it would also push, too early
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                sync(made)
                _move_into(made, target)
                require_saved(target, learned)
            trainer.accelerator.wait_for_everyone()  # another host on the same disk would remove it
        finally:
            if trainer.accelerator.is_local_main_process:
                remove(made)


def learned_epsilons(model: Any) -> dict[str, Tensor]:
    """The values of every trained ε, by the path of its site; if ε is sharded, every process must call this."""
    modules = epsilon_modules(model).items()
    return whole_values({path: module.epsilon for path, module in modules if module.epsilon.requires_grad})


def require_saved(directory: Path, learned: dict[str, Tensor]) -> None:
    """Checks that the files of a saved model or adapter contain the value of every trained ε.

    Compared by value, not by name: transformers gives the weights of some families other names in files.

    Raises:
        RuntimeError: A value is missing. The files are kept.
    """
    files = [*directory.glob("model*.safetensors"), *directory.glob("adapter_model*.safetensors")]
    found = []
    for file in files:
        with safe_open(file, "pt") as saved:
            # keys() is not that of a dictionary
            found += [saved.get_tensor(key).float() for key in saved.keys() if key.endswith(".epsilon")]  # noqa: SIM118
    left = []
    for path, value in learned.items():
        place = next((index for index, other in enumerate(found) if torch.equal(other, value)), None)
        if place is None:
            left.append(path)
        else:
            del found[place]
    if files and left:
        raise RuntimeError(f"the saved model lacks the learned ε of {len(left)} sites (first: {left[0]})")


def _move_into(made: Path, target: Path) -> None:
    names = {path.name for path in made.iterdir()}
    for path in made.iterdir():
        if path.is_dir():
            remove(target / path.name)
        os.replace(path, target / path.name)
    for pattern in _WEIGHTS:  # of an earlier model with other shards
        for path in target.glob(pattern):
            if path.name not in names:
                path.unlink()


def _rename(made: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}{ASIDE}")
    if target.exists():  # an earlier run's, or a damaged one; `tidy` restores it after a kill here
        remove(aside)
        os.replace(target, aside)
    os.replace(made, target)
    remove(aside)


def _counts_name(process: int) -> str:
    return f"log_state_{process}.json"


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN
