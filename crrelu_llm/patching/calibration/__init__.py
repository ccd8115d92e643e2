"""Calibration: fits a patch to text, so that the model keeps its function before any training.

Levels, each containing the one before: `fit` (ε, closed form), `refit` (also scale, shift and gain of each channel,
folded into the weights, and the following projection by ridge regression), `reconstruct` (then a short training of
each MLP toward the original MLP's output).

walk.py runs the model layer by layer; taps.py watches its activations; anatomy.py finds the weights around each;
tasks.py decides what is kept; progress.py keeps it on the disk; density.py, epsilon.py, shape.py,
refit.py and reconstruct.py are the numerical methods.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.anatomy import Mlp, find_mlps
from crrelu_llm.patching.calibration.density import set_moments
from crrelu_llm.patching.calibration.progress import Progress
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tasks import Calibrated, FitTask, MlpTask
from crrelu_llm.patching.calibration.walk import Layer, Walk
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.finite import evaluating, require_finite
from crrelu_llm.patching.sites import Site

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
    progress: Progress | None = None,
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
        progress: Where finished layers are kept; those that it holds are put back instead of calibrated again.

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
            what = "Fitting the density" if config.calibration == "none" else f"Calibrating ({config.calibration})"
            bar = tqdm(walk, total=len(walk.layers), desc=what, unit="layer")
            work = _Work(model, walk, mlps, config, build, swap, progress)
            for index, layer in enumerate(bar):
                work.on(layer, index, found)
                bar.set_postfix(error=f"{max(found[site.path].relative_error for site in layer.sites):.3f}")
    except BaseException as error:
        if any(entry.changed_weights for entry in found.values()):
            error.weights_changed = True  # type: ignore[attr-defined]
            if isinstance(error, InputError):
                raise InputError(f"{error}; the model in memory is half calibrated: load it again") from error
            logger.warning("the calibration ended half-way: the model in memory has changed weights; load it again")
        raise
    return found


class _Work:
    """Calibrates one layer after the other, or puts back what an earlier call has finished."""

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        mlps: dict[str, Mlp],
        config: PatchConfig,
        build: Callable[[Site], nn.Module],
        swap: Callable[[Site, nn.Module], None],
        progress: Progress | None,
    ):
        self.model, self.walk, self.mlps, self.config = model, walk, mlps, config
        self.build, self.swap, self.progress = build, swap, progress
        self.first: dict[int, tuple[str, nn.Module]] = {}  # layers may share an MLP: it is calibrated once
        self.finished = 0 if progress is None else progress.begin()
        if self.finished:
            logger.warning("%d of %d layers were calibrated before and are kept", self.finished, len(walk.layers))

    def on(self, layer: Layer, index: int, found: dict[str, Calibrated]) -> None:
        """Swaps the sites of a layer; adds to `found` what was done."""
        owners = {site.path: id(self.model.get_submodule(site.owner)) for site in layer.sites}
        new = {owners[site.path]: site for site in reversed(layer.sites) if owners[site.path] not in self.first}
        if self._put_back(index, new, found):
            self._swap_all(layer, owners, found)
            return
        tasks = self._calibrate(index, new, found)
        self._swap_all(layer, owners, found)
        changed = {p: task for p, task in tasks.items() if isinstance(task, MlpTask) and found[p].changed_weights}
        if changed and self._give_up_on(changed, found):
            for owner, site in new.items():
                self.first[owner] = (site.path, tasks[site.path].activation)
            self._swap_all(layer, owners, found)
        if self.progress is not None:
            done = {path: (found[path], task.activation, self.mlps.get(path)) for path, task in tasks.items()}
            self.progress.save(index, done)

    def _calibrate(
        self, index: int, new: dict[int, Site], found: dict[str, Calibrated]
    ) -> dict[str, FitTask | MlpTask]:
        activations = {site.path: self.build(site) for site in new.values()}
        if self.config.fits_density:
            set_moments(self.model, self.walk, list(new.values()), activations)
        tasks = _look(self.model, self.walk, list(new.values()), self.mlps, self.config, activations)
        for owner, site in new.items():
            found[site.path] = tasks[site.path].solve(self.config, index)
            self.first[owner] = (site.path, tasks[site.path].activation)
        return tasks

    def _put_back(self, index: int, new: dict[int, Site], found: dict[str, Calibrated]) -> bool:
        if index >= self.finished or self.progress is None:
            return False
        activations = {site.path: self.build(site) for site in new.values()}
        records = self.progress.load(index, activations, self.mlps)
        if records is None:  # its file is damaged: it is calibrated again, and the layers after it
            self.finished = 0
            return False
        found |= records
        self.first |= {owner: (site.path, activations[site.path]) for owner, site in new.items()}
        return True

    def _swap_all(self, layer: Layer, owners: dict[str, int], found: dict[str, Calibrated]) -> None:
        for site in layer.sites:
            same, activation = self.first[owners[site.path]]
            self.swap(site, activation)
            found[site.path] = found[same]

    def _give_up_on(self, changed: dict[str, MlpTask], found: dict[str, Calibrated]) -> bool:
        """Whether an MLP does not give what its weights say; it then gets its own back, and ε alone is fitted.

        What was computed from the weights must be what the model computes: a clamp that few tokens reach, for
        example, is nothing that the weights say.
        """
        with contextlib.ExitStack() as stack:
            for task in changed.values():
                stack.enter_context(task.checking())
            self.walk.run(batches=1)
        wrong = {path: task for path, task in changed.items() if not task.agrees}
        found |= {path: task.give_up(self.config) for path, task in wrong.items()}
        return bool(wrong)


def _changeable(model: nn.Module, sites: list[Site], blocks: Tensor, level: str) -> dict[str, Mlp]:
    if level in ("none", "fit"):
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
    activations: dict[str, nn.Module],
) -> dict[str, FitTask | MlpTask]:
    """Runs the current layer once, and keeps what its sites need."""
    tasks: dict[str, FitTask | MlpTask] = {}
    for site in sites:
        original, activation, mlp = model.get_submodule(site.path), activations[site.path], mlps.get(site.path)
        if mlp is not None:
            tasks[site.path] = MlpTask(site, original, activation, mlp)
        else:
            note = None if config.calibration in ("none", "fit") else _ONLY_FIT
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
