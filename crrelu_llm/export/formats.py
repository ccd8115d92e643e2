"""The formats of `crrelu export`, with the packages that each needs and the models that it can hold."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from crrelu_llm.errors import InputError
from crrelu_llm.quiet import quiet

TRANSFORMERS = "5.23"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        runtime: Import name of the package that runs it.
        packages: The packages that must be importable to write and run it.
        caches: Whether the graph takes and returns the keys and values of earlier tokens.
        dtypes: The dtypes in which the runtime computes on a CPU.
    """

    runtime: str
    packages: tuple[str, ...] = ()
    caches: bool = True
    dtypes: tuple[str, ...] = ("float32",)


FORMATS = {
    "onnx": Format("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), dtypes=("float32", "float16")),
    "openvino": Format("openvino", ("openvino",), dtypes=("float32", "float16", "bfloat16")),
    "executorch": Format("executorch", ("executorch",), caches=False),
    "transformers": Format("transformers", dtypes=("float32", "float16", "bfloat16")),
}
_GGUF = (
    "gguf (llama.cpp) has no CRReLU, and no per-channel numbers around an activation; go back to the model's own "
    "activation (`crrelu inspect MODEL` names it) with `crrelu patch MODEL --activation silu --calibration none "
    "--output_dir D`, which prints what that costs in perplexity, and convert D"
)


def require(name: str, dtype: str = "float32") -> Format:
    """The format of this name; checks that its packages are installed.

    Raises:
        InputError: The format is unknown, a package is missing or too old, or the format lacks the dtype.
    """
    if name == "gguf":
        raise InputError(f"--format {_GGUF}")
    if name not in FORMATS:
        raise InputError(f"--format: unknown format {name!r}; choose {', '.join(FORMATS)}")
    found = FORMATS[name]
    if dtype not in found.dtypes:
        raise InputError(
            f"--dtype {dtype}: {found.runtime} does not run {name} in this dtype on a CPU; choose "
            f"{' or '.join(found.dtypes)}"
        )
    missing = [package for package in found.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"--format {name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if found.packages and not has_exporter(name):
        raise InputError(
            f"--format {name} needs transformers {TRANSFORMERS} or newer (transformers.exporters), but this one is "
            f"{version('transformers')}: pip install 'transformers>={TRANSFORMERS}'"
        )
    return found


def has_exporter(name: str) -> bool:
    """Whether the installed transformers has an exporter and a runner for the format."""
    try:
        with quiet():
            from transformers.exporters.auto import EXPORT_BACKENDS
            from transformers.exporters.base import ExportedModel  # noqa: F401
    except ImportError:
        return False
    return getattr(EXPORT_BACKENDS.get(name), "runner", None) is not None


def versions_of(found: Format) -> dict[str, Any]:
    """Versions of a format's packages."""
    result = {}
    for package in found.packages:
        try:
            result[package] = version(package)
        except PackageNotFoundError:  # installed under another name (onnxruntime-gpu)
            continue
    return result
