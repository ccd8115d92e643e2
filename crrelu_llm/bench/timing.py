"""Times functions in turns, so that other load on the machine affects all of them: medians and quartiles."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SAMPLE = 2.0  # the least duration of one sample in milliseconds; a fast function is called several times
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median of the samples, and their quartiles."""

    milliseconds: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarises samples, in milliseconds per call."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(functions: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[Timing]:
    """Times each function once per round, in a different order each round.

    Args:
        functions: The functions to time; each has already run, so that nothing is left to compile.
        repeats: How many rounds.
        device: The device of the computation.

    Returns:
        One entry per function.
    """
    calls = [_calls(sample(function, 1, device)) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    for turn in range(repeats):
        random.Random(turn).shuffle(order)
        for index in order:
            samples[index].append(sample(functions[index], calls[index], device))
    return [Timing.of(found) for found in samples]


def sample(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds per call, over several calls: by events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) * 1e3 / calls


def _calls(milliseconds: float) -> int:
    return min(_MOST_CALLS, max(1, math.ceil(_SAMPLE / max(milliseconds, 1e-6))))
