"""What watches a training: ε that must move, and one line a log, without one number for every site."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from crrelu_llm.errors import InputError

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


class EpsilonMoves(TrainerCallback):
    """Stops a training that was to learn ε, and in whose first steps no ε has changed: something has frozen it.

    Args:
        trainer: One of ours.
        steps: How many steps to wait; in the first of a warm-up the learning rate is 0.
    """

    def __init__(self, trainer: Any, steps: int = 3):
        self.trainer, self.steps = trainer, steps
        self._start: dict[str, float] = {}
        self._from = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps where ε starts."""
        self._start, self._from = self.trainer.epsilon_means(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares, once."""
        if state.global_step - self._from == self.steps and self.trainer.epsilon_means() == self._start:
            raise InputError(
                f"ε has not changed in {self.steps} steps, though epsilon_learning_rate is above 0: it is not in what "
                "the optimiser trains; report this with your recipe, or set epsilon_learning_rate: 0"
            )


def quieten(trainer: Any) -> None:
    """Puts our two callbacks in the place of transformers' own."""
    for theirs, ours in ((ProgressCallback, QuietProgressCallback), (PrinterCallback, QuietPrinterCallback)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
