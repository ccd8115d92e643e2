"""Callbacks: a check that ε is learned, and log lines without the values per site."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from crrelu_llm.errors import InputError
from crrelu_llm.training.optimizer import epsilon_modules

PER_SITE = "epsilon/"


def _without_sites(logs: dict[str, float] | None) -> dict[str, float]:
    return {key: value for key, value in (logs or {}).items() if not key.startswith(PER_SITE)}


class QuietProgressCallback(ProgressCallback):
    """transformers' progress bar; the ε of each site goes only to the trackers and the log history."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the logs without the values per site."""
        super().on_log(args, state, control, logs=_without_sites(logs), **kwargs)


class QuietPrinterCallback(PrinterCallback):
    """The same without the progress bar (`disable_tqdm`)."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the logs without the values per site."""
        super().on_log(args, state, control, logs=_without_sites(logs), **kwargs)


class EpsilonLearns(TrainerCallback):
    """Stops a training that should learn ε if no gradient reaches ε, or if the optimiser lacks it.

    The check runs once, before the first step. Sharded parameters, which differ from the model's, are not checked.

    Args:
        trainer: One of our trainers.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the gradients of the first step."""
        if self._looked or self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            return
        self._looked = True
        learned = [module.epsilon for module in epsilon_modules(self.trainer.model).values()]
        learned = [value for value in learned if value.requires_grad]
        ours = {id(value) for group in self.trainer.optimizer.param_groups for value in group["params"]}
        why = "the optimiser does not have it" if any(id(value) not in ours for value in learned) else None
        if learned and all(value.grad is None for value in learned):
            why = "no gradient reaches it"
        if why:
            raise InputError(
                f"ε would not be learned, though epsilon_learning_rate is above 0: {why}; look for what freezes or "
                "replaces the MLPs, or set epsilon_learning_rate: 0"
            )


def quieten(trainer: Any) -> None:
    """Replaces two of transformers' callbacks by ours."""
    for theirs, ours in ((ProgressCallback, QuietProgressCallback), (PrinterCallback, QuietPrinterCallback)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
