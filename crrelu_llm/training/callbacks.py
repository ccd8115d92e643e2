"""What is shown while training: one line a log, without one number for every site."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback

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


def quieten(trainer: Any) -> None:
    """Puts our two callbacks in the place of transformers' own."""
    for theirs, ours in ((ProgressCallback, QuietProgressCallback), (PrinterCallback, QuietPrinterCallback)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
