"""Where a result was measured: versions, platform, device."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from crrelu_llm import __version__

_PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed",
    "liger_kernel", "lm_eval",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of this package and of the installed packages that can affect a result."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"crrelu_llm": __version__}  # a checkout that is only on the path has no metadata
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(processes: int = 1, distribution: str = "none") -> dict[str, Any]:
    """Python, platform, device, processes and versions, for reports."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "distribution": distribution,
        "versions": versions(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
