"""Peak memory of one call, in bytes that torch allocates: exact, and the same each time."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `function` holds at once, its result included, above what was allocated before.

    On a GPU this is the caching allocator's own count. On a CPU every allocation and release of torch's allocator is
    counted, which the profiler records; the interpreter and what libraries allocate by themselves are not.

    Args:
        function: Has run before; leaves nothing allocated, and releases nothing that was there before the call.
        device: Where it computes.
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
    """What was allocated (positive) and released (negative) on the CPU, in bytes, in order of time."""
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
    """Keeps what others left in cycles from being released within it, which would lower the count."""
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps from stderr what the profiler's C++ code writes there when it starts and stops; no option turns it off."""
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
