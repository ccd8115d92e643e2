"""Checkpoint in, patched checkpoint out, with its patch report beside the weights."""

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crrelu_llm.compat.transformers import loading_whole
from crrelu_llm.environment import versions
from crrelu_llm.errors import DiskError, InputError, reading
from crrelu_llm.patching import fingerprint, loading, readme, section, standalone
from crrelu_llm.patching.calibration.finished_layers import Progress, identity
from crrelu_llm.patching.calibration.pixels import calibration_pixels, probe_pixels
from crrelu_llm.patching.calibration.tokens import calibration_blocks
from crrelu_llm.patching.calibration.walk import computing_device
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.finite import require_finite
from crrelu_llm.patching.fold import Linears, find_linears
from crrelu_llm.patching.fold import fold as fold_into
from crrelu_llm.patching.patch import patch, trained_activations, unpatch
from crrelu_llm.patching.sites import find_sites

REPORT = "patch_report.json"
ORIGIN = "patch_origin.json"
_A_FEW_TOKENS = torch.arange(3, 35)[None]
# Fields of the report that have no value for a checkpoint that was only converted.
_EMPTY = ("activation", "epsilon_per", "options", "calibration", "perplexity")
DTYPES = ("float32", "bfloat16", "float16", "auto")


def patch_checkpoint(
    model: str,
    config: PatchConfig | None,
    output_dir: str | Path,
    dtype: str = "float32",
    fold: bool = False,
    perplexity: Callable[[Any, Any], Any] | None = None,
    perplexity_of: dict[str, Any] | None = None,
    loads_alone: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Loads a MODEL, patches it and saves it. A patched MODEL gets its original activations back first.

    A calibration stores its finished layers beside `output_dir` until the checkpoint is written. After a kill, the
    same call resumes at the first unfinished layer, and writes the same checkpoint bit for bit.

    Args:
        model: Hub name, directory, `.gguf` file or `builtin:nano`.
        config: The patch; None only converts (a GGUF file into a directory).
        output_dir: Where to save; must be absent or empty.
        dtype: Name of the torch dtype for loading and saving; `"auto"` keeps the checkpoint's.
        fold: Fold the calibration into the weights around each activation, and save a plain network.
        perplexity: Called with (model, tokenizer) before and after the patch and, if the patch is calibrated, after
            the plain swap. For an image model it returns `{accuracy, loss}`.
        perplexity_of: The data of that measurement (`tokens` or `images`, `data`), for the report.
        loads_alone: Also write the file that lets the checkpoint load without this package (see `standalone`).
        **options: `revision`, `trust_remote_code`, `use_safetensors`.

    Returns:
        The patch report, as written to patch_report.json.

    Raises:
        InputError: The MODEL cannot be read, is already patched in this way, or has no sites.
        DiskError: The disk is full or read-only.
    """
    started = time.perf_counter()
    if fold and (config is None or not config.fits):
        raise InputError("--fold moves a calibration into the weights; set calibration: fit")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose {', '.join(DTYPES)}")
    weights = {key: value for key in ("use_safetensors",) if (value := options.pop(key, None)) is not None}
    options = {key: value for key, value in options.items() if value}
    about = loading.load_config(model, **options)
    tokenizer, probe, blocks = _input(model, about, config, options)
    with loading_whole():
        loaded = loading.load_model(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options, **weights
        )
    loading.require_saving(loaded, model)
    if loads_alone and config is not None:
        standalone.require(loaded, config.activation, config.fits and not fold, model)
    progress = None
    trusted = options.get("trust_remote_code", False)
    made_from = origin(model, config, dtype, options.get("revision"), trusted) | ({"fold": True} if fold else {})
    if config is not None and blocks is not None:
        loaded.to(_device_for(loaded))
        progress = Progress(progress_dir(output_dir), identity(made_from, blocks, computing_device(loaded)))
    changes_weights = progress is not None and config is not None and config.calibration == "refit"
    require_space(loaded, output_dir, copies=2 if changes_weights else 1)
    if loading.head_of(about) == loading.CLASSIFIER:
        perplexity = None  # a classifier predicts no tokens
    report: dict[str, Any] = {"model": model, "model_type": loaded.config.model_type}
    with _keeping(progress):
        if config is None:
            report |= dict.fromkeys(_EMPTY) | {"sites": [], "skipped": []}
        else:
            linears = find_linears(loaded, find_sites(loaded, config.parts), probe) if fold else None
            report |= _patch(
                model, loaded, tokenizer, config, probe, blocks, progress, linears, perplexity, perplexity_of or {}
            )
        report |= {"seconds": time.perf_counter() - started, "versions": versions()}
        header = readme.header_of_model(model, options.get("revision")) if config is not None else ""
        describe = functools.partial(_describe, loaded, Path(output_dir).resolve().name, header, loads_alone)
        loading.save(loaded, tokenizer, output_dir, {REPORT: report, ORIGIN: made_from}, describe)
    return report


def _describe(model: Any, name: str, header: str, loads_alone: bool, directory: Path) -> None:
    """Writes the README of a checkpoint and, if requested, its own code."""
    found = section.read(model.config)
    if found is not None:
        readme.write(directory, name, found, header)
    if loads_alone:
        standalone.write_standalone(directory, name)


def progress_dir(output_dir: str | Path) -> Path:
    """Where the calibration of a checkpoint stores its finished layers, until the checkpoint is written."""
    target = Path(output_dir).resolve()
    return target.with_name(f".{target.name}.calibration")


@contextlib.contextmanager
def _keeping(progress: Progress | None) -> Iterator[None]:
    """Removes the progress of a calibration that succeeded or cannot succeed; otherwise says what was kept."""
    try:
        yield
    except InputError:
        if progress is not None:
            progress.remove()
        raise
    except (KeyboardInterrupt, DiskError) as error:
        layers = 0 if progress is None else progress.layers
        kept = f"{layers} calibrated layers are kept" if layers else "nothing half-written was left behind"
        before = f"{error}; " if isinstance(error, DiskError) else ""
        raise type(error)(f"{before}{kept}; run the same command again to go on") from error
    if progress is not None:
        progress.remove()


def _patch(
    name: str,
    model: Any,
    tokenizer: Any,
    config: PatchConfig,
    probe: torch.Tensor,
    blocks: torch.Tensor | None,
    progress: Progress | None,
    linears: Linears | None,
    perplexity: Callable[[Any, Any], Any] | None,
    perplexity_of: dict[str, Any],
) -> dict[str, Any]:
    """Patches a loaded model, and returns the fields of the report."""
    found = section.read(model.config)
    compared = trained_activations(model, config)
    as_it_was: dict[str, Any] = {}
    if found is not None:
        section.check_may_be_patched_again(found, config, name)
        if perplexity is not None:  # with the activation of training: going back may cost quality
            as_it_was = {"patched": perplexity(model, tokenizer)}
        unpatch(model)
    with reading(name, ours=True):
        require_finite(model, probe)
    measured: dict[str, Any] | None = None
    if perplexity is not None:
        measured = {**as_it_was, "before": perplexity(model, tokenizer), "after_naive": None}
        if config.calibrates:
            patch(model, replace(config, calibration="none", density="standard"))
            measured["after_naive"] = perplexity(model, tokenizer)
            unpatch(model)
    done = patch(model, config, blocks=blocks, progress=progress, compared=compared)
    if linears is not None:
        patched = {entry["path"] for entry in done.sites}
        fold_into(model, {path: around for path, around in linears.items() if path in patched})
        section.make_plain(model.config)
    if perplexity is not None and measured is not None:
        measured["after"] = perplexity(model, tokenizer)
        loss = measured["after"]["loss"] if isinstance(measured["after"], dict) else measured["after"]
        if math.isnan(loss):
            raise InputError(f"{name}: the patched model's loss on this data is NaN; nothing was written")
    return {
        "activation": config.activation,
        "epsilon_per": config.epsilon_per,
        "options": config.as_dict(),
        "sites": done.sites,
        "skipped": done.skipped,
        "calibration": done.calibration,
        **_measured(measured, perplexity_of),
    }


def _input(
    model: str, about: Any, config: PatchConfig | None, options: dict[str, Any]
) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """A MODEL's tokenizer or image processor, a small test input, and the calibration data.

    These are read before the model, so that a wrong name fails before the weights are loaded.
    """
    calibrates = config is not None and config.calibrates
    if loading.head_of(about) == loading.IMAGE_CLASSIFIER:
        processor = loading.load_processor(model, **options)
        with reading(f"{model}: its image processor cannot be used", "mend its preprocessor_config.json"):
            probe = probe_pixels(processor, about)
        if config is None or not calibrates:
            return processor, probe, None
        pixels = calibration_pixels(config.calibration_data, processor, config.calibration_images, about)
        return processor, probe, pixels
    tokenizer = loading.load_tokenizer(model, **options)
    size = getattr(about.get_text_config(), "vocab_size", None)
    loading.require_embeddings(tokenizer, size, model)
    probe = _A_FEW_TOKENS % (size or 1)
    if config is None or not calibrates:
        return tokenizer, probe, None
    return tokenizer, probe, calibration_blocks(config.calibration_data, tokenizer, config.calibration_tokens, about)


def _measured(values: dict[str, Any] | None, on: dict[str, Any]) -> dict[str, Any]:
    """The measurements for the report: perplexity, or accuracy and loss for an image model."""
    if values is None or not isinstance(values["after"], dict):
        return {"perplexity": None if values is None else {**values, **on}}
    found: dict[str, Any] = {"perplexity": None}
    for name in values["after"]:
        found[name] = {when: value if value is None else value[name] for when, value in values.items()} | on
    return found


def _device_for(model: Any) -> torch.device:
    """The current GPU if the model fits on it with room to work, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info()
    return torch.device("cuda", torch.cuda.current_device()) if 1.5 * _bytes(model) < free else torch.device("cpu")


def _bytes(model: Any) -> int:
    """Size of the weights; tied ones count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require_space(model: Any, output_dir: str | Path, copies: int = 1) -> None:
    """Raises InputError if the disk has no room for `copies` copies of the model's weights."""
    needed = copies * _bytes(model)
    place = Path(output_dir).absolute()
    parent = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.05 * needed:
        raise InputError(
            f"{output_dir}: making the checkpoint needs {needed / 2**30:.1f} GiB, and {parent} has "
            f"{free / 2**30:.1f} GiB free; choose another output_dir, or make room"
        )


def read_report(directory: str | Path) -> dict[str, Any] | None:
    """The patch report beside a checkpoint, or None."""
    path = Path(directory) / REPORT
    if not path.is_file():
        return None
    with reading(str(path), "patch again, or remove it"):
        return json.loads(path.read_text())


def origin(
    model: str, config: PatchConfig | None, dtype: str, revision: str | None, trust_remote_code: bool | None = False
) -> dict[str, Any]:
    """Everything that determines a patched copy of a MODEL, including the version of this package."""
    return {
        "model": model,
        "options": None if config is None else config.as_dict(),
        "dtype": dtype,
        "revision": revision,
        **fingerprint.of_model(model, revision, trust_remote_code=trust_remote_code),
        "digests": fingerprint.digests_of(path) if (path := Path(loading.resolve(model))).exists() else {},
        "data": fingerprint.of_data(config.calibration_data) if config is not None and config.calibrates else [],
        "crrelu_llm": versions()["crrelu_llm"],
    }


def read_origin(directory: str | Path) -> dict[str, Any] | None:
    """The origin of a patched copy, or None if the directory holds no patched copy."""
    path = Path(directory) / ORIGIN
    return json.loads(path.read_text()) if path.is_file() else None
