"""Peak memory of one call, in bytes allocated by torch: exact and reproducible."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """The peak memory of `function`, in bytes, including its result, relative to the memory allocated before.

    On a GPU the caching allocator gives the number. On a CPU the profiler records every allocation and release of
    torch's allocator; memory of the interpreter and of other allocators is not counted.

    Args:
        function: A function that has already run; it must leave nothing allocated and release no earlier memory.
        device: The device of the computation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    held = peak = 0
    for change in _changes(function):
        held += change
        peak = max(peak, held)
    return peak


def _changes(function: Callable[[], object]) -> list[int]:
    """The allocations (positive) and releases (negative) on the CPU, in bytes, in order of time."""
    from torch.profiler import ProfilerActivity, profile

    with (
        _keeping_garbage(),
        _silent(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and str(event.device_type()) == "DeviceType.CPU"
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def _keeping_garbage() -> Iterator[None]:
    """A context without garbage collection, which would release earlier memory and lower the count."""
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def _silent() -> Iterator[None]:
    """A context that hides the stderr messages of the profiler's C++ code, which no option turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
