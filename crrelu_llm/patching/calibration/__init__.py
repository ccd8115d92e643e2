"""Calibration: fits a patch to text, so that the model keeps its function before any training.

There are two levels. `fit` fits ε, and scale, shift, gain and offset of each channel, inside the activation; no weight
changes. `refit` then also changes the projection after the activation where that lowers the error on held-back text.
Neither uses labels or the gradient of the loss.

walk.py runs the model layer by layer; taps.py observes its activations; statistics.py keeps the statistics that the
fit needs; parameters.py is the fit; following.py refits the projection; tasks.py runs these steps for one site;
progress.py stores finished layers on disk; density.py measures the centre and width of a fitted density.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.centres import set_moments
from crrelu_llm.patching.calibration.finished_layers import Progress
from crrelu_llm.patching.calibration.following import Refit, find_following
from crrelu_llm.patching.calibration.records import Record
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tasks import SiteTask
from crrelu_llm.patching.calibration.walk import Layer, Walk
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.finite import evaluating, require_finite
from crrelu_llm.patching.sites import Site

logger = logging.getLogger("crrelu_llm")
_ONLY_FIT = "no projection to refit: what follows is not one matrix of this site's own"
_NO_BETTER = "refit was no better on held-back tokens"
_PROBE_TOKENS = 64


@dataclass
class Calibration:
    """The result of a calibration.

    Attributes:
        records: The record of each site, by its path.
        seconds: The duration of the calibration.
        forward_seconds: The part of it spent in two forward passes over the text, the least that a calibration needs;
            None where layers of an earlier call were restored.
    """

    records: dict[str, Record]
    seconds: float
    forward_seconds: float | None


def calibrate(
    model: nn.Module,
    sites: list[Site],
    blocks: Tensor,
    config: PatchConfig,
    build: Callable[[Site], nn.Module],
    swap: Callable[[Site, nn.Module], None],
    progress: Progress | None = None,
) -> Calibration:
    """Swaps the sites of a model layer by layer; each is fitted to the outputs of the patched layers before it.

    Beside the model, calibration needs memory for one layer's inputs and outputs on the text and for one histogram per
    channel of each of its sites; `refit` also needs a few matrices of the site's width squared. The same text gives
    the same result on the same device.

    Args:
        model: The unpatched model; `refit` changes its weights.
        sites: Its sites.
        blocks: Calibration text as token ids, `(blocks, tokens)`, int64; one block in eight is held back.
        config: The patch; `calibration` is the level.
        build: Builds the new activation of a site.
        swap: Puts the new activation into the model.
        progress: Where finished layers are stored; layers stored there are restored instead of calibrated again.

    Returns:
        A record of each site, and the time taken.

    Raises:
        InputError: Activations are not finite, or weights cannot be changed.
    """
    from tqdm.auto import tqdm

    found: dict[str, Record] = {}
    started = time.perf_counter()
    try:
        with evaluating(model):
            require_finite(model, blocks[:1, :_PROBE_TOKENS])
            following = _changeable(model, sites, blocks, config.calibration)
            walk = Walk(model, sites, blocks)
            what = "Fitting the density" if config.calibration == "none" else f"Calibrating ({config.calibration})"
            bar = tqdm(walk, total=len(walk.layers), desc=what, unit="layer")
            work = _Work(model, walk, following, config, build, swap, progress)
            for index, layer in enumerate(bar):
                work.on(layer, index, found)
                bar.set_postfix(error=f"{max(found[site.path].relative_error for site in layer.sites):.3f}")
            seconds = time.perf_counter() - started
            needed = 2 * walk.seconds / walk.passes if walk.passes and not work.finished else None
    except BaseException as error:
        if any(entry.changed_weights for entry in found.values()):
            error.weights_changed = True  # type: ignore[attr-defined]
            if isinstance(error, InputError):
                raise InputError(f"{error}; the model in memory is half calibrated: load it again") from error
            logger.warning("the calibration ended half-way: the model in memory has changed weights; load it again")
        raise
    return Calibration(found, seconds, needed)


class _Work:
    """Calibrates one layer after the other, or restores the layers that an earlier call finished."""

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        following: dict[str, nn.Module],
        config: PatchConfig,
        build: Callable[[Site], nn.Module],
        swap: Callable[[Site, nn.Module], None],
        progress: Progress | None,
    ):
        self.model, self.walk, self.following, self.config = model, walk, following, config
        self.build, self.swap, self.progress = build, swap, progress
        self.first: dict[int, tuple[str, nn.Module]] = {}  # layers may share an MLP, which is calibrated once
        self.finished = 0 if progress is None else progress.begin()
        if self.finished:
            logger.warning("%d of %d layers were already calibrated and are kept", self.finished, len(walk.layers))

    def on(self, layer: Layer, index: int, found: dict[str, Record]) -> None:
        """Swaps the sites of a layer and adds their records to `found`."""
        owners = {site.path: id(self.model.get_submodule(site.owner)) for site in layer.sites}
        new = {owners[site.path]: site for site in reversed(layer.sites) if owners[site.path] not in self.first}
        activations = {site.path: self.build(site) for site in new.values()}
        self.first |= {owner: (site.path, activations[site.path]) for owner, site in new.items()}
        if self._put_back(index, activations, found):
            self._swap_all(layer, owners, found)
            return
        tasks = self._fit(list(new.values()), activations, found)
        self._swap_all(layer, owners, found)
        if self.config.calibration == "refit":
            self._refit(tasks, found)
            self._swap_all(layer, owners, found)
        if self.progress is not None:
            self.progress.save(
                index, {path: (found[path], activations[path], self.following.get(path)) for path in activations}
            )

    def _fit(
        self, sites: list[Site], activations: dict[str, nn.Module], found: dict[str, Record]
    ) -> dict[str, SiteTask]:
        if self.config.fits_density:
            set_moments(self.model, self.walk, sites, activations)
        tasks = {
            site.path: SiteTask(site, self.model.get_submodule(site.path), activations[site.path]) for site in sites
        }

        def seen(path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
            with self.walk.aside():
                tasks[path].seen(x, y, other, self.walk.held_back)

        if tasks:
            with tapped(self.model, sites, seen) as report:
                self.walk.run(report)  # after each batch: the next one may be held back
        for path, task in tasks.items():
            found[path] = task.solve(self.config)
        return tasks

    def _refit(self, tasks: dict[str, SiteTask], found: dict[str, Record]) -> None:
        """Refits the projections after the layer's new activations, which are already in the model."""
        work = {
            path: Refit(self.following[path], task.original, task.activation)
            for path, task in tasks.items()
            if path in self.following and found[path].note is None and found[path].kept == "fit"
        }

        def seen(path: str, x: Tensor, y: Tensor, other: Tensor | None, result: Tensor) -> None:
            if path in work:
                work[path].add(x, other, self.walk.held_back)

        if work:
            with tapped(self.model, [task.site for task in tasks.values()], seen) as report:
                self.walk.run(report)
        for path in tasks:
            if path in work and work[path].solve():
                found[path].kept, found[path].changed_weights = "refit", True
            elif found[path].note is None and found[path].relative_error > 0:
                found[path].note = _NO_BETTER if path in work else _ONLY_FIT

    def _put_back(self, index: int, activations: dict[str, nn.Module], found: dict[str, Record]) -> bool:
        if index >= self.finished or self.progress is None:
            return False
        records = self.progress.load(index, activations, self.following)
        if records is None:  # the file is damaged: this layer and those after it are calibrated again
            self.finished = 0
            return False
        found |= records
        return True

    def _swap_all(self, layer: Layer, owners: dict[str, int], found: dict[str, Record]) -> None:
        for site in layer.sites:
            same, activation = self.first[owners[site.path]]
            self.swap(site, activation)
            found[site.path] = found[same]


def _changeable(model: nn.Module, sites: list[Site], blocks: Tensor, level: str) -> dict[str, nn.Module]:
    if level != "refit":
        return {}
    if getattr(model, "is_quantized", False):
        raise InputError(
            'calibration="refit" changes weights, and this model is quantised; use "fit", or patch the checkpoint '
            "before it is quantised"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter).__module__.startswith("bitsandbytes"):
            raise InputError(
                f'calibration="refit" changes weights, and {name} is quantised; use "fit", or patch the checkpoint '
                "before it is quantised"
            )
        if parameter.is_meta:
            raise InputError(
                f'calibration="refit" changes weights, and {name} is offloaded; use "fit", or give it more memory'
            )
    return find_following(model, sites, blocks[:1, :_PROBE_TOKENS])
