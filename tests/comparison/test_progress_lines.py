"""The lines of a comparison: one a run, moving on a terminal, whole elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest

from crrelu_llm.comparison import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def run(lines, clock, name, seconds):
    lines.begin(name)
    clock.seconds += seconds
    lines.step(1, 2)
    lines.end("loss 5")


def test_elsewhere_a_run_is_one_whole_line_with_the_time_that_is_left(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines = progress.Lines(4)
    lines.keep("native, seed 0")
    run(lines, clock, "native, seed 1", 30)
    run(lines, clock, "relu, seed 0", 50)
    run(lines, clock, "relu, seed 1", 40)
    lines.close()
    assert sys.stderr.getvalue().splitlines() == [
        "[1/4] native, seed 0: kept",
        "[2/4] native, seed 1: loss 5 in 30 s, about 60 s left",
        "[3/4] relu, seed 0: loss 5 in 50 s, about 40 s left",
        "[4/4] relu, seed 1: loss 5 in 40 s",
    ]


def test_on_a_terminal_the_line_moves_and_is_taken_away_where_the_comparison_stops(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    lines = progress.Lines(2)
    run(lines, clock, "native", 10)
    lines.begin("relu")
    lines.close()
    shown = sys.stderr.getvalue()
    assert shown.count("\n") == 1 and "[1/2] native " + "━" * 10 + "╌" * 10 in shown
    assert shown.endswith("\r\x1b[K"), "what comes next begins at the left"
