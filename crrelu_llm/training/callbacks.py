"""What watches a training: ε that must be learned, and one line a log, without one number for every site."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from crrelu_llm.errors import InputError
from crrelu_llm.training.optimizer import epsilon_modules

PER_SITE = "epsilon/"


def _without_sites(logs: dict[str, float] | None) -> dict[str, float]:
    return {key: value for key, value in (logs or {}).items() if not key.startswith(PER_SITE)}


class QuietProgressCallback(ProgressCallback):
    """transformers' progress bar; ε of each site goes to the trackers and the log history only."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the logs without the values per site."""
        super().on_log(args, state, control, logs=_without_sites(logs), **kwargs)


class QuietPrinterCallback(PrinterCallback):
    """The same without a progress bar (`disable_tqdm`)."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the logs without the values per site."""
        super().on_log(args, state, control, logs=_without_sites(logs), **kwargs)


class EpsilonLearns(TrainerCallback):
    """Stops a training that was to learn ε where no gradient reaches it, or the optimiser does not have it.

    Looked at once, before the first step. Sharded parameters are others than the model's, and are not looked at.

    Args:
        trainer: One of ours.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the gradients of the first step."""
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
    """Puts our two callbacks in the place of transformers' own."""
    for theirs, ours in ((ProgressCallback, QuietProgressCallback), (PrinterCallback, QuietPrinterCallback)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
