"""The progress of a comparison: one line per run with the time left, instead of the logs of each training."""

import sys
import time
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from crrelu_llm.report.text import duration
from crrelu_llm.training.callbacks import QuietPrinterCallback, QuietProgressCallback

_CELLS = 20


class Lines:
    """The lines of a comparison, on stderr.

    On a terminal, the line of the current run is updated; elsewhere it is written once, when the run has ended.

    Args:
        runs: The number of runs.
    """

    def __init__(self, runs: int):
        self.runs, self.ended, self.kept = runs, 0, 0
        self.started = self.began = time.monotonic()
        self.label, self._moving = "", False
        self.moves = sys.stderr.isatty() and PartialState().is_main_process

    def begin(self, label: str) -> None:
        """Starts the line of a run."""
        self.label, self.began = label, time.monotonic()
        self._show(0.0)

    def watch(self, trainer: Any) -> None:
        """Shows the steps of a trainer, and hides its logs."""
        for theirs in (QuietPrinterCallback, QuietProgressCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(_Moves(self))

    def step(self, done: int, of: int) -> None:
        """Updates the line of the current run, which has done `done` of `of` steps."""
        self._show(done / max(of, 1))

    def end(self, said: str) -> None:
        """Ends the line of the current run."""
        self.ended += 1
        took = duration(time.monotonic() - self.began)
        self._write(f"{self._place(self.ended)} {self.label}: {said} in {took}{self._left(self.ended)}", "\n")

    def keep(self, label: str) -> None:
        """Writes the line of a run that an earlier call finished."""
        self.ended += 1
        self.kept += 1
        self._write(f"{self._place(self.ended)} {label}: kept", "\n")

    def close(self) -> None:
        """Clears an unfinished line, so that later output starts on an empty line."""
        if self._moving:
            self._write("", "")

    def _show(self, part: float) -> None:
        if self.moves:
            full = round(part * _CELLS)
            bar = "━" * full + "╌" * (_CELLS - full)
            self._write(f"{self._place(self.ended + 1)} {self.label} {bar}{self._left(self.ended + part)}", "")
            self._moving = True

    def _place(self, number: int) -> str:
        return f"[{number:{len(str(self.runs))}}/{self.runs}]"

    def _left(self, ended: float) -> str:
        made = ended - self.kept
        if made < 0.5 or ended >= self.runs:
            return ""
        left = (time.monotonic() - self.started) / made * (self.runs - ended)
        return f", about {duration(max(left, 10.0))} left"

    def _write(self, line: str, end: str) -> None:
        self._moving = False
        if PartialState().is_main_process:
            begin = "\r\x1b[K" if self.moves else ""
            print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)


class _Moves(TrainerCallback):
    """Updates the line after every step."""

    def __init__(self, lines: Lines):
        self.lines = lines

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports a finished step of the current run."""
        self.lines.step(state.global_step, state.max_steps)
