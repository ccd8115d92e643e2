"""Turns functions into the cases of bench.json: warms up, measures memory and time, and computes ratios."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from crrelu_llm.bench.allocations import peak_memory
from crrelu_llm.bench.timing import Timing, interleaved


@dataclass(frozen=True)
class Candidate:
    """A function to time.

    Attributes:
        name: The name of the case.
        backend: The backend of the case.
        kind: The group within which cases are compared: `activation`, `gated`, `plain`, `model`.
        direction: `forward`, `backward` or `both`.
        run: Runs the function once.
        traffic: The fewest bytes that the function can read and write; None if that is not meaningful.
        failed: Returns after a run why the numbers belong to another backend; None if they are valid.
    """

    name: str
    backend: str
    kind: str
    direction: str
    run: Callable[[], object]
    traffic: int | None = None
    failed: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Measured:
    """The measurements of one candidate; `peak` in bytes."""

    candidate: Candidate
    timing: Timing
    peak: int


def measure(
    candidates: list[Candidate], repeats: int, device: torch.device
) -> tuple[list[Measured], list[dict[str, str]]]:
    """Measures candidates against each other.

    Returns:
        The measurements of each, and the candidates left out, `{name, backend, direction, reason}` each. If one of
        torch's own functions fails, its error is raised, because the baseline is missing.
    """
    kept, left_out = [], []
    for candidate in candidates:
        reason = _warm_up(candidate)
        if reason is None:
            kept.append(candidate)
        else:
            about = {"name": candidate.name, "backend": candidate.backend, "direction": candidate.direction}
            left_out.append(about | {"reason": reason})
    peaks = [peak_memory(candidate.run, device) for candidate in kept]
    timings = interleaved([candidate.run for candidate in kept], repeats, device)
    return [Measured(*found) for found in zip(kept, timings, peaks, strict=True)], left_out


def _warm_up(candidate: Candidate) -> str | None:
    """Runs a candidate twice; returns why it must be left out, or None."""
    try:
        for _ in range(2):  # the first run compiles
            candidate.run()
    except Exception as error:
        if candidate.backend == "torch":
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return candidate.failed()


def case(
    measured: Measured, baseline: Measured, copy: Measured | None, dtype: str, shape: tuple[int, ...]
) -> dict[str, Any]:
    """One case of bench.json.

    Args:
        measured: The measurements of the case.
        baseline: GELU's measurements for the same kind, direction, dtype and shape.
        copy: The measured copy of a tensor of this dtype and shape; None without bandwidth.
        dtype: Name of the dtype.
        shape: The shape of one input.
    """
    candidate, timing = measured.candidate, measured.timing
    speed = _gigabytes_per_second(measured)
    copy_speed = None if copy is None else _gigabytes_per_second(copy)
    return {
        "name": candidate.name,
        "backend": candidate.backend,
        "kind": candidate.kind,
        "dtype": dtype,
        "shape": list(shape),
        "direction": candidate.direction,
        "milliseconds": timing.milliseconds,
        "milliseconds_low": timing.low,
        "milliseconds_high": timing.high,
        "ratio_to_gelu": timing.milliseconds / baseline.timing.milliseconds,
        "gigabytes_per_second": speed,
        "copy_gigabytes_per_second": copy_speed,
        "fraction_of_copy_bandwidth": None if speed is None or copy_speed is None else speed / copy_speed,
        "peak_memory_bytes": measured.peak,
    }


def _gigabytes_per_second(measured: Measured) -> float | None:
    traffic = measured.candidate.traffic
    return None if traffic is None else traffic / (measured.timing.milliseconds * 1e6)
