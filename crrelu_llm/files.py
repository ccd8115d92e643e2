"""JSON files that are whole or absent, and valid: no half-written ones, no NaN."""

import json
import math
import numbers
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Copies a value into plain JSON values; numbers that are not finite become None, as JSON has none."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file beside `path` and renames it; the directory is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def is_leftover(path: Path) -> bool:
    """Whether a file or directory is what a killed writer of ours left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")
