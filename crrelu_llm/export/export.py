"""Exports a patched MODEL: writes the export beside its place, reloads and checks it, then renames it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.environment import versions
from crrelu_llm.errors import InputError, reading
from crrelu_llm.export import check, graph, runtimes, transformers_format
from crrelu_llm.export.formats import require, versions_of
from crrelu_llm.files import remove_leftovers, replacing, write_json, writing
from crrelu_llm.patching import loading, section
from crrelu_llm.patching.guard import check as check_patch
from crrelu_llm.patching.transform import require_space
from crrelu_llm.quiet import quiet

REPORT = "export_report.json"


def export_model(
    model: str,
    format_name: str,
    output_dir: str | Path,
    dtype: str = "float32",
    max_length: int = 512,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Exports a patched MODEL, and checks the export on its own runtime.

    Removes the leftovers of a killed export to the same place; the command ensures that no other export runs there.

    Args:
        model: Hub name or directory of a patched checkpoint.
        format_name: `onnx`, `openvino`, `executorch` or `transformers`.
        output_dir: Where to write; must be absent or empty.
        dtype: Name of the torch dtype of the export.
        max_length: executorch: the longest text, for which memory is planned in advance.
        trust_remote_code: Whether code from the model's repository may run.
        tell: Called with progress messages.

    Returns:
        The report, as written to export_report.json.

    Raises:
        InputError: The model is not patched, the format cannot hold it, or its runtime is not installed.
        DiskError: The disk is full or read-only.
    """
    started = time.perf_counter()
    target = Path(output_dir).resolve()
    with writing(str(target)):
        remove_leftovers(target)
    found = require(format_name, dtype)
    require_patched(loading.load_config(model, trust_remote_code=trust_remote_code), model)
    tell(f"loading {model}")
    loaded = loading.load_model(model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(model, trust_remote_code)
    loaded.requires_grad_(False)
    graph.require_exportable(loaded, model)
    check_patch(loaded)
    require_space(loaded, output_dir, copies=1)
    ids = check.tokens(tokenizer, loaded.config.get_text_config().vocab_size)
    with replacing(target) as scratch:
        tell(f"exporting to {format_name}")
        if format_name == "transformers":
            result = transformers_format.write_and_check(loaded, tokenizer, scratch, ids, dtype, model, tell)
        else:
            result = _write_and_check(loaded, tokenizer, format_name, scratch, ids, dtype, model, max_length, tell)
        report = {
            "model": model,
            "model_type": loaded.config.model_type,
            "format": format_name,
            "runtime": found.runtime,
            "dtype": dtype,
            "files": _files(scratch),
            **result,
            "threads": torch.get_num_threads(),
            "versions": versions() | versions_of(found),
            "seconds": time.perf_counter() - started,
        }
        write_json(scratch / REPORT, report)
    return report


def require_patched(config: Any, name: str) -> None:
    """Raises InputError for a model that is not patched, which other tools can export."""
    if section.read(config) is None:
        raise InputError(
            f"{name}: not patched, so it has no CRReLU to export; use transformers' own exporters "
            "(transformers.exporters), or patch it first with `crrelu patch`"
        )


def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    """The model's tokenizer; None if the checkpoint has none."""
    try:
        return loading.load_tokenizer(model, trust_remote_code=trust_remote_code)
    except InputError:
        return None


def _write_and_check(
    loaded: Any,
    tokenizer: Any,
    format_name: str,
    scratch: Path,
    ids: torch.Tensor,
    dtype: str,
    name: str,
    max_length: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    inputs = graph.sample(loaded, format_name)
    cached = "past_key_values" in inputs
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or max_length
    limit = min(max_length, positions) if format_name == "executorch" else None
    if limit is not None and limit < ids.shape[1]:
        raise InputError(f"--max_length {limit}: the check alone takes {ids.shape[1]} tokens; give a larger value")
    started = time.perf_counter()
    exported = graph.trace(loaded, format_name, inputs, limit or 0)
    with writing(str(scratch)), quiet():
        exported.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    del exported
    seconds = time.perf_counter() - started
    tell(f"checking it in {require(format_name, dtype).runtime}")
    empty = graph.empty_cache(loaded) if cached else None
    with reading(f"{format_name} cannot run this {loaded.config.model_type}", "choose another --format or --dtype"):
        runtime = runtimes.load(format_name, scratch, empty)
        result = check.compare(runtimes.Torch(loaded), runtime, ids, dtype, name)
    return {"cache": cached, "max_length": limit, "export_seconds": seconds, **result}


def _files(directory: Path) -> list[dict[str, Any]]:
    """Names and sizes of the files."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return [{"name": str(path.relative_to(directory)), "bytes": path.stat().st_size} for path in found]
