"""torch: tracing and transforms, tensors saved by autograd, and tensors without contents."""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from crrelu_llm.compat import Private

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "compiled_apart",
    "cpp_compiler",
    "is_compiler_disabled",
    "is_func_active",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "outer_hooks",
    "place",
    "tree_flatten",
    "tree_iter",
    "tree_map_only",
]

RELIES_ON = (
    Private("torch._C:_are_functorch_transforms_active", "the operators would be called under torch.func"),
    Private("torch.autograd.forward_ad:_current_level", "the operators would be called in forward mode"),
    Private("torch._C._autograd:_top_saved_tensors_default_hooks", "recompute_activation under checkpointing"),
    Private("torch:UntypedStorage._cdata", "recompute_activation could not identify saved tensors"),
    Private("torch:Tensor._version", "recompute_activation would not see changes in place"),
    Private("torch:Tensor._base", "gradients of the halves of a gate-and-up tensor would need an extra pass"),
    Private("torch._inductor.cpp_builder:get_cpp_compiler", "the compiled CPU kernels"),
    Private("torch._dynamo.config:disable", "the compiled CPU kernels where torch.compile is disabled"),
    Private("torch._functorch.config:donated_buffer", "crrelu bench op, which runs a backward pass twice"),
    Private("torch._subclasses.fake_tensor:FakeTensorMode", "crrelu plan"),
    Private("torch.utils._python_dispatch:is_traceable_wrapper_subclass", "distributed tensors"),
)


def compiled_apart(function: FunctionType, **options: Any) -> Callable[..., Any]:
    """`function` compiled as one graph, with its own cache in torch, even if it is compiled several times.

    Before torch 2.13 the cache belongs to the function's code, so each call here copies the code.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(function, fullgraph=True, isolate_recompiles=True, recompile_limit=64, **options)
    copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(copied, fullgraph=True, **options)


def is_func_active() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def outer_hooks() -> tuple | None:
    """The innermost active hooks on saved tensors, a pair; None if there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def place(tensor: Tensor) -> tuple[int, int]:
    """The start of a tensor in memory: equal for two living tensors that share memory there."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile uses on the CPU.

    Raises:
        Exception: There is no compiler; torch's own exception class.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def is_compiler_disabled() -> bool:
    """Whether torch.compile is disabled (TORCHDYNAMO_DISABLE)."""
    return bool(torch._dynamo.config.disable)
