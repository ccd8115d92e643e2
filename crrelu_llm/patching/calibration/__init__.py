"""Calibration: fits a patch to text, so that the model keeps its function before any training.

Levels, each containing the one before: `fit` (ε, closed form), `refit` (also scale, shift and gain of each channel,
folded into the weights, and the following projection by ridge regression), `reconstruct` (then a short training of
each MLP toward the original MLP's output).

walk.py runs the model layer by layer; taps.py watches its activations; anatomy.py finds the weights around each;
tasks.py decides what is kept; epsilon.py, shape.py, refit.py and reconstruct.py are the numerical methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.anatomy import Mlp, find_mlps
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tasks import Calibrated, FitTask, MlpTask
from crrelu_llm.patching.calibration.walk import Walk
from crrelu_llm.patching.finite import require_finite
from crrelu_llm.patching.sites import Site

if TYPE_CHECKING:
    from crrelu_llm.patching.swap import PatchConfig

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

    The memory needed beside the model is one layer's inputs and outputs on the text, and one MLP's weights. The same
    text gives the same result on every device.

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

    was_training = model.training
    model.eval()
    found: dict[str, Calibrated] = {}
    try:
        require_finite(model, blocks[:1, :_PROBE_TOKENS])
        mlps = _changeable(model, sites, blocks, config.calibration)
        walk = Walk(model, sites, blocks)
        bar = tqdm(walk, total=len(walk.layers), desc=f"Calibrating ({config.calibration})", unit="layer")
        first: dict[int, tuple[str, nn.Module]] = {}  # layers may share an MLP: it is calibrated once
        for index, layer in enumerate(bar):
            owners = {site.path: id(model.get_submodule(site.owner)) for site in layer.sites}
            tasks = _look(model, walk, [s for s in layer.sites if owners[s.path] not in first], mlps, config, build)
            for site in layer.sites:
                if site.path in tasks:
                    task = tasks.pop(site.path)  # with it goes what it kept
                    found[site.path] = task.solve(config, index)
                    first[owners[site.path]] = (site.path, task.activation)
                same, activation = first[owners[site.path]]
                found[site.path] = found[same]
                swap(site, activation)
            bar.set_postfix(error=f"{max(found[site.path].relative_error for site in layer.sites):.3f}")
    except InputError as error:
        if any(entry.changed_weights for entry in found.values()):
            raise InputError(f"{error}; the model in memory is half calibrated: load it again") from error
        raise
    finally:
        model.train(was_training)
    return found


def _changeable(model: nn.Module, sites: list[Site], blocks: Tensor, level: str) -> dict[str, Mlp]:
    if level == "fit":
        return {}
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
