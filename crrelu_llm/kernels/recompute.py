"""Saves memory in training: the activation's output is recomputed in the backward pass instead of being stored.

An MLP stores the pre-activation, for the activation's gradient, and the activation's output, for the weight gradient
of the projection after it. The output can be recomputed from the pre-activation in one elementwise pass.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.compat.torch import FakeTensor, is_func_active, outer_hooks, place

_local = threading.local()
# Tensor types that can be identified by their memory; a fake tensor, used to plan memory, has an address without
# contents. Distributed tensors and other wrappers are left out.
_PLAIN = (Tensor, FakeTensor)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """A context in which autograd does not store noted outputs (see `note`), but recomputes them in the backward pass.

    The gradients are the same bit for bit. Outer hooks on saved tensors (activation checkpointing, offloading) receive
    the tensors that are stored. The context has no effect without gradients, while a compiler traces, or under
    torch.func; nor on tensors derived from the output before they are stored, by a cast or by dropout. Changing an
    input in place before the backward pass is an error, unless the change goes through `.data`.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_func_active():
        yield
        return
    before = getattr(_local, "recorder", None)
    recorder = _Recorder(outer_hooks())
    _local.recorder = recorder
    try:
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack):
            yield
    finally:
        _local.recorder = before
        recorder.noted.clear()  # autograd keeps the hooks, which keep the recorder


def note(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Notes that `output` is `function(*inputs)`, deterministic, without side effects and cheap to recompute."""
    if torch.compiler.is_compiling():
        return
    recorder = getattr(_local, "recorder", None)
    if recorder is not None and type(output) in _PLAIN and output.requires_grad and output.is_contiguous():
        # ZeRO-3 frees ε after this module, and gathers it again only after the backward pass of the next module.
        kept = tuple(part.detach().clone() if hasattr(part, "ds_id") else part for part in inputs)
        recorder.noted[place(output)] = _Noted(output, output._version, function, kept)


@dataclass
class _Noted:
    output: Tensor  # held until the end of the context, so that no other tensor reuses its memory
    version: int
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def is_(self, tensor: Tensor) -> bool:
        """Whether a tensor at the same address is the output or a reshaped view (a linear layer flattens it)."""
        return (
            tensor.numel() == self.output.numel() > 0
            and tensor.dtype == self.output.dtype
            and tensor.is_contiguous()
            and tensor._version == self.version
        )


class _Recorder:
    def __init__(self, outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None) -> None:
        self.outer = outer
        self.noted: dict[tuple[Any, ...], _Noted] = {}  # by place

    def pack(self, tensor: Tensor) -> Any:
        """What autograd stores instead of a tensor."""
        if type(tensor) in _PLAIN and tensor.layout == torch.strided:
            noted = self.noted.get(place(tensor))
            if noted is not None and noted.is_(tensor):
                return _Recomputed(noted.function, [self._keep(part) for part in noted.inputs], tensor.shape)
        return self._keep(tensor)

    def _keep(self, tensor: Tensor) -> Any:
        if self.outer is None:
            # The parameter itself, not its memory, which ZeRO-3 frees and gathers again.
            return _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)
        return _KeptOutside(self.outer[0](tensor), self.outer[1])


@dataclass
class _Kept:
    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in place: it "
                f"is at version {self.tensor._version}, not {self.version}"
            )
        return self.tensor


@dataclass
class _KeptOutside:
    packed: Any
    unpack: Callable[[Any], Tensor]

    def restore(self) -> Tensor:
        return self.unpack(self.packed)


@dataclass
class _Recomputed:
    function: Callable[..., Tensor]
    inputs: list[_Kept | _KeptOutside]
    shape: torch.Size

    def restore(self) -> Tensor:
        with torch.no_grad():
            return self.function(*(part.restore() for part in self.inputs)).view(self.shape)


def _unpack(kept: _Kept | _KeptOutside | _Recomputed) -> Tensor:
    return kept.restore()
