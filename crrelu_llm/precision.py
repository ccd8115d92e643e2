"""The default dtype of weights: float32, or a checkpoint's own 16-bit dtype where that is faster on this machine."""

import functools
import time
from collections.abc import Iterable
from typing import Any

import torch

_ROWS, _WIDTH = 256, 1024  # the size of a prompt, and of a small model's projection
_SECONDS = 0.1
_WORTH_IT = 1.25  # the speed-up that 16 bits must reach to outweigh their rounding


def choose_dtype(configs: Iterable[Any], device: str) -> tuple[str, str | None]:
    """Chooses one dtype in which to load all of the models.

    A 16-bit dtype is chosen only if every checkpoint is already stored in it, so that no weight is rounded.

    Args:
        configs: The models' configs; their `dtype` is the dtype of the stored weights.
        device: The device of the computation.

    Returns:
        The name of the dtype, and a line that says why; None if there was no choice.
    """
    stored = {getattr(config, "dtype", None) or torch.float32 for config in configs}
    own = next(iter(stored)) if len(stored) == 1 else torch.float32
    name = str(own).removeprefix("torch.")
    if own not in (torch.bfloat16, torch.float16):
        why = "the checkpoints differ in dtype" if len(stored) > 1 else None
        return "float32", why and _line("float32", why)
    ratio = seconds(torch.float32, device) / seconds(own, device)
    if ratio >= _WORTH_IT:
        return name, _line(name, f"the checkpoint's own, {ratio:.1f} times faster than float32 here")
    speed = f"{1 / ratio:.1f} times slower here" if ratio < 0.9 else "no faster here"
    return "float32", _line("float32", f"the checkpoint's {name} is {speed}")


def _line(name: str, why: str) -> str:
    return f"dtype: {name} ({why}); --dtype sets another"


@functools.cache
def seconds(dtype: torch.dtype, device: str) -> float:
    """The time of one projection of a prompt; the measurement takes about a tenth of a second."""
    weight = torch.randn(_WIDTH, _WIDTH, device=device).to(dtype)
    rows = torch.randn(_ROWS, _WIDTH, device=device).to(dtype)

    def once() -> float:
        started = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        once()
        best, until = once(), time.perf_counter() + _SECONDS
        while time.perf_counter() < until:
            best = min(best, once())
    return best
