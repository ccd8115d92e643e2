"""Calibration: fits a patch to text, so that the model keeps its function before any training.

Levels, each containing the one before: `fit` (ε, closed form), `refit` (also scale, shift and gain of each channel,
folded into the weights, and the following projection by ridge regression), `reconstruct` (then a short training of
each MLP toward the original MLP's output).

walk.py runs the model layer by layer; taps.py watches its activations; anatomy.py finds the weights around each;
tasks.py decides what is kept; epsilon.py, shape.py, refit.py and reconstruct.py are the numerical methods.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.anatomy import Mlp, find_mlps
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tasks import Calibrated, FitTask, MlpTask
from crrelu_llm.patching.calibration.walk import Layer, Walk
from crrelu_llm.patching.finite import evaluating, require_finite
from crrelu_llm.patching.sites import Site

if TYPE_CHECKING:
    from crrelu_llm.patching.swap import PatchConfig

logger = logging.getLogger("crrelu_llm")
_ONLY_FIT = "only epsilon was fitted: this MLP is more than linear layers around its activation"
_PROBE_TOKENS = 64


def calibrate(
    model: nn.Module,
    sites: list[Site],
    blocks: Tensor,
    config: PatchConfig,
    build: Callable[[Site], nn.Module],
    swap: Callable[[Site, nn.Module], None],
) -> dict[str, Calibrated]:
    """Swaps the sites of a model layer by layer, each fitted to the stream that the patched layers before it give.

    The memory needed beside the model is one layer's inputs and outputs on the text, a few copies of one MLP's
    weights, and a few matrices of its width squared. The same text gives the same result again on the same device.

    Args:
        model: The unpatched model; its MLPs' weights are changed at the levels above `fit`.
        sites: Its sites.
        blocks: Calibration text as token ids, `(blocks, tokens)`, int64.
        config: The patch; `calibration` is the level.
        build: Makes a new activation for a site.
        swap: Puts it in.

    Returns:
        What was done, by path.

    Raises:
        InputError: Activations that are not finite, or weights that cannot be changed.
    """
    from tqdm.auto import tqdm

    found: dict[str, Calibrated] = {}
    try:
        with evaluating(model):
            require_finite(model, blocks[:1, :_PROBE_TOKENS])
            mlps = _changeable(model, sites, blocks, config.calibration)
            walk = Walk(model, sites, blocks)
            bar = tqdm(walk, total=len(walk.layers), desc=f"Calibrating ({config.calibration})", unit="layer")
            first: dict[int, tuple[str, nn.Module]] = {}  # layers may share an MLP: it is calibrated once
            for index, layer in enumerate(bar):
                _calibrate_layer(model, walk, layer, mlps, config, build, swap, index, first, found)
                bar.set_postfix(error=f"{max(found[site.path].relative_error for site in layer.sites):.3f}")
    except BaseException as error:
        if any(entry.changed_weights for entry in found.values()):
            error.weights_changed = True  # type: ignore[attr-defined]
            if isinstance(error, InputError):
                raise InputError(f"{error}; the model in memory is half calibrated: load it again") from error
            logger.warning("the calibration ended half-way: the model in memory has changed weights; load it again")
        raise
    return found


def _calibrate_layer(
    model: nn.Module,
    walk: Walk,
    layer: Layer,
    mlps: dict[str, Mlp],
    config: PatchConfig,
    build: Callable[[Site], nn.Module],
    swap: Callable[[Site, nn.Module], None],
    index: int,
    first: dict[int, tuple[str, nn.Module]],
    found: dict[str, Calibrated],
) -> None:
    owners = {site.path: id(model.get_submodule(site.owner)) for site in layer.sites}
    new = {owners[site.path]: site for site in reversed(layer.sites) if owners[site.path] not in first}
    tasks = _look(model, walk, list(new.values()), mlps, config, build)
    for path, task in tasks.items():
        found[path] = task.solve(config, index)
        first[owners[path]] = (path, task.activation)
    for site in layer.sites:
        same, activation = first[owners[site.path]]
        swap(site, activation)
        found[site.path] = found[same]
    changed = {p: task for p, task in tasks.items() if isinstance(task, MlpTask) and found[p].changed_weights}
    if not changed:
        return
    # What was computed from the weights must be what the model computes: a clamp that few tokens reach, for example,
    # is nothing that the weights say.
    with contextlib.ExitStack() as stack:
        for task in changed.values():
            stack.enter_context(task.checking())
        walk.run(batches=1)
    for path, task in changed.items():
        if task.agrees:
            continue
        kept = task.give_up(config)
        first[owners[path]] = (path, task.activation)
        for site in layer.sites:
            if owners[site.path] == owners[path]:
                found[site.path] = kept
                swap(site, task.activation)


def _changeable(model: nn.Module, sites: list[Site], blocks: Tensor, level: str) -> dict[str, Mlp]:
    if level == "fit":
        return {}
    if getattr(model, "is_quantized", False):
        raise InputError(
            f'calibration="{level}" changes weights, and this model is quantised; use "fit", or patch the checkpoint '
            "before it is quantised"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter).__module__.startswith("bitsandbytes"):
            raise InputError(
                f'calibration="{level}" changes weights, and {name} is quantised; use "fit", or patch the checkpoint '
                "before it is quantised"
            )
        if parameter.is_meta:
            raise InputError(
                f'calibration="{level}" changes weights, and {name} is offloaded; use "fit", or give it more memory'
            )
    return find_mlps(model, sites, blocks[:1, :_PROBE_TOKENS])


def _look(
    model: nn.Module,
    walk: Walk,
    sites: list[Site],
    mlps: dict[str, Mlp],
    config: PatchConfig,
    build: Callable[[Site], nn.Module],
) -> dict[str, FitTask | MlpTask]:
    """Runs the current layer once, and keeps what its sites need."""
    tasks: dict[str, FitTask | MlpTask] = {}
    for site in sites:
        original, activation, mlp = model.get_submodule(site.path), build(site), mlps.get(site.path)
        if mlp is not None:
            tasks[site.path] = MlpTask(site, original, activation, mlp)
        else:
            note = None if config.calibration == "fit" else _ONLY_FIT
            tasks[site.path] = FitTask(site, original, activation, note)
    if not tasks:
        return tasks
    hooks = [hook for task in tasks.values() for hook in task.hooks()]

    def seen(path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
        tasks[path].seen(x, y, other)

    try:
        with tapped(model, sites, seen):
            walk.run()
    finally:
        for hook in hooks:
            hook.remove()
    return tasks
