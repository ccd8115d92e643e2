"""Runs a model over calibration text layer by layer, each layer on the outputs of the patched layers before it."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.compat.torch import tree_flatten, tree_map_only
from crrelu_llm.patching.feeding import batch_size, run_on
from crrelu_llm.patching.sites import Site

logger = logging.getLogger("crrelu_llm")
_PROBE_TOKENS = 48
_EVERY = 8


@dataclass
class Layer:
    """A layer of the model, and the sites in it."""

    path: str
    sites: list[Site]


class Walk:
    """Iterates over the layers of a model; the outputs of only one layer are kept at a time.

    The caller may `run` each layer (hooks see its inputs), change it, and go on: the next layer then receives the
    outputs of the changed one. The model's own forward does the work outside the layers (embeddings, masks, rotary
    angles); the layers before the current one only pass the stored outputs through.

    Some models do not allow this: their layers share modules, run several times, or pass tensors around the next
    layer. A test on a few tokens detects such a model, and every `run` then goes through the whole model: the same
    result, but the time grows with the square of the depth.

    A model in host memory that is too large for the GPU is moved there one layer at a time, together with the parts
    outside the layers (see `computing_device`).

    Args:
        model: A causal LM or an image classifier in evaluation mode.
        sites: Its sites.
        blocks: Token ids, `(blocks, tokens)`, int64; or the pixels of images (see `run_on`).

    Attributes:
        held_back: Whether the text of the current batch is held back from the fit.
        passes: How often the whole text has run through a layer, on average over the layers.
        seconds: The time of these passes, without the time spent in `aside`.
    """

    def __init__(self, model: nn.Module, sites: list[Site], blocks: Tensor):
        self.model = model
        self.home = next(model.parameters()).device
        fitted, judging = _divided(blocks.to(self.home))
        size = batch_size(blocks)
        self.batches = [*fitted.split(size), *(judging.split(size) if len(judging) else ())]
        self._judging = -(-len(fitted) // size)  # the first held-back batch
        self.held_back = False
        self.passes = self.seconds = 0.0
        self._aside = 0.0
        self.layers = self._in_order(_layers(model, sites))
        self.stepwise = self._hands_through()
        if not self.stepwise:
            logger.warning(
                "calibration runs the whole model for each layer: this model's layers do not simply follow each other"
            )
        self._stream: list[Any] = [None] * len(self.batches)
        self._current = 0

    def __iter__(self) -> Iterator[Layer]:
        device = computing_device(self.model)
        visits = self.stepwise and device != self.home
        if visits:
            self._move_the_rest(device)
        try:
            for index, layer in enumerate(self.layers):
                self._current = index
                if visits:
                    _move(self.model.get_submodule(layer.path), device)
                yield layer
                if self.stepwise and index + 1 < len(self.layers):
                    self._advance()
                if visits:
                    _move(self.model.get_submodule(layer.path), self.home)
        finally:
            if visits:
                self._move_the_rest(self.home)
                for layer in self.layers:
                    _move(self.model.get_submodule(layer.path), self.home)

    def run(self, after_batch: Callable[[], None] = lambda: None) -> None:
        """Runs the current layer, in its present state, on the whole text."""
        with self._timed():
            for index, batch in enumerate(self.batches):
                self.held_back = index >= self._judging
                self._forward(batch, self._stream[index], lambda output: None)
                after_batch()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context whose time does not count as time of a forward pass."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - started

    def _advance(self) -> None:
        with self._timed():
            for index, batch in enumerate(self.batches):
                self._forward(batch, self._stream[index], functools.partial(self._stream.__setitem__, index))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started, self._aside = time.perf_counter(), 0.0
        yield
        self.seconds += time.perf_counter() - started - self._aside
        self.passes += 1 / len(self.layers) if self.stepwise else 1

    def _forward(self, batch: Tensor, stream: Any, keep: Callable[[Any], None]) -> None:
        if not self.stepwise:
            self._call(batch)
            return
        layer = self.model.get_submodule(self.layers[self._current].path)

        def stop(module: Any, args: Any, output: Any) -> None:
            keep(output)
            raise _Reached

        before = [self.model.get_submodule(done.path) for done in self.layers[: self._current]]
        hook = layer.register_forward_hook(stop)
        try:
            with _handing_through(before, stream), contextlib.suppress(_Reached):
                self._call(batch)
        finally:
            hook.remove()

    def _call(self, batch: Tensor) -> None:
        with torch.no_grad():
            run_on(self.model, batch, head=False)

    def _move_the_rest(self, device: torch.device) -> None:
        """Moves the parts of the model outside the layers, and the text."""
        inside = tuple(f"{layer.path}." for layer in self.layers)
        for path, module in self.model.named_modules():
            if not f"{path}.".startswith(inside):
                _move(module, device, recurse=False)
        self.batches = [batch.to(device) for batch in self.batches]

    def _in_order(self, layers: list[Layer]) -> list[Layer]:
        """Layers in the order in which they first run."""
        seen: list[str] = []
        hooks = [
            self.model.get_submodule(layer.path).register_forward_pre_hook(
                lambda *_, path=layer.path: seen.append(path)
            )
            for layer in layers
        ]
        try:
            self._call(self.batches[0][:1, :_PROBE_TOKENS])
        finally:
            for hook in hooks:
                hook.remove()
        self._calls = seen
        return sorted(layers, key=lambda layer: seen.index(layer.path) if layer.path in seen else len(seen))

    def _hands_through(self) -> bool:
        """Whether every layer returns the same output when the layers before it only pass stored outputs through."""
        owners = [id(self.model.get_submodule(site.owner)) for layer in self.layers for site in layer.sites]
        if sorted(self._calls) != sorted(layer.path for layer in self.layers) or len(set(owners)) < len(owners):
            return False
        probe = self.batches[0][:4, :_PROBE_TOKENS]  # for pixels, the slice keeps every channel
        outputs: list[Any] = []
        hooks = [
            self.model.get_submodule(layer.path).register_forward_hook(lambda m, a, o: outputs.append(_copied(o)))
            for layer in self.layers
        ]
        try:
            self._call(probe)
        finally:
            for hook in hooks:
                hook.remove()
        self.stepwise = True
        for index in range(1, len(self.layers)):
            self._current = index
            found: list[Any] = []
            try:
                self._forward(probe, outputs[index - 1], found.append)
            except Exception:  # whatever the reason, the model cannot run this way, and the other way is right
                return False
            if not found or not _same(found[0], outputs[index]):
                return False
        return True


def _divided(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks for the fit and held-back blocks: one in eight, the last of a few, or none of a single one."""
    judging = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
    judging[_EVERY - 1 :: _EVERY] = True
    if len(blocks) > 1 and not judging.any():
        judging[-1] = True
    return blocks[~judging], blocks[judging]


def computing_device(model: nn.Module) -> torch.device:
    """The device of a calibration: the model's, or the current GPU if the whole model is in host memory (layers then
    visit the GPU one at a time)."""
    home = next(model.parameters()).device
    whole = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if whole and torch.cuda.is_available() and not hasattr(model, "hf_device_map"):
        return torch.device("cuda", torch.cuda.current_device())
    return home


def _move(module: nn.Module, device: torch.device, recurse: bool = True) -> None:
    if recurse:
        module.to(device)
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


class _Reached(Exception):
    """Raised once the layer has run: the rest of the forward pass is not needed."""


def _layers(model: nn.Module, sites: list[Site]) -> list[Layer]:
    grouped: dict[str, list[Site]] = {}
    for site in sites:
        grouped.setdefault(_layer_path(site.path), []).append(site)
    return [Layer(path, found) for path, found in grouped.items()]


def _layer_path(path: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.act_fn`."""
    components = path.split(".")
    index = next((i for i, component in enumerate(components) if component.isdigit()), len(components) - 2)
    return ".".join(components[: index + 1])


@contextlib.contextmanager
def _handing_through(modules: list[nn.Module], output: Any) -> Iterator[None]:
    """Makes modules return `output` for any input."""
    held = [module.__dict__.get("forward") for module in modules]  # device_map sets one on the instance
    for module in modules:
        module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for module, forward in zip(modules, held, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _copied(output: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


def _same(first: Any, second: Any) -> bool:
    ours, theirs = tree_flatten(first)[0], tree_flatten(second)[0]
    return len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor):
        return True
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-5)
