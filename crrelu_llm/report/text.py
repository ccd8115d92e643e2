"""Numbers as text, in the same format in the sentence, the tables and the plots."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

MISSING = "–"


def number(value: float | None, pattern: str = "{:.4g}") -> str:
    """A number in its metric's format; a dash where there is none."""
    if value is None:
        return MISSING
    text = pattern.format(value)
    if not pattern.endswith("%}"):
        if abs(value) >= 1e6:
            text = f"{value:.3g}"
        elif value != 0 and not text.strip("-0."):
            text = f"{value:.2g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def size(value: float | None, pattern: str) -> str:
    """The size of a difference: a difference of percentages is in percentage points."""
    if value is None:
        return MISSING
    if pattern.endswith("%}"):
        digits = int(re.sub(r"\D", "", pattern) or 0) + 1  # differences are smaller than the values themselves
        return f"{abs(value) * 100:.{digits}f} points"
    return number(abs(value), pattern)


def signed(value: float | None, pattern: str) -> str:
    """A difference with its sign."""
    if value is None:
        return MISSING
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + size(value, pattern)


def interval(low: float | None, high: float | None, pattern: str) -> str:
    """A signed interval, with the unit given once."""
    if low is None or high is None:
        return MISSING
    return f"{signed(low, pattern).removesuffix(' points')} to {signed(high, pattern)}"


def ends(low: float, high: float, pattern: str) -> str:
    """The ends of an interval of the metric itself, with the unit given once."""
    unit = "%" if pattern.endswith("%}") else ""
    return f"{number(low, pattern).removesuffix(unit)} to {number(high, pattern)}"


def spread(values: Sequence[float | None], pattern: str = "{:.4g}") -> str:
    """Mean ± standard deviation (n − 1) of the values that are not None."""
    present = [value for value in values if value is not None]
    if not present:
        return MISSING
    mean = number(statistics.fmean(present), pattern)
    if len(present) == 1:
        return mean
    deviation = number(statistics.stdev(present), pattern)
    if mean.endswith("%") and deviation.endswith("%"):
        mean = mean[:-1]
    return f"{mean} ± {deviation}"


def p_value(p: float | None) -> str:
    """A p-value with two digits, never rounded to 0."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def duration(seconds: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(size_in_bytes: float | None) -> str:
    """Bytes in MiB or GiB."""
    if size_in_bytes is None:
        return MISSING
    mebibytes = size_in_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def grid_label(grid: dict[str, Any]) -> str:
    """A grid value, such as `beta = 0.1`."""
    return ", ".join(f"{key} = {value}" for key, value in grid.items())


def one_line(text: Any) -> str:
    """Any text on one line."""
    return " ".join(str(text).split())
