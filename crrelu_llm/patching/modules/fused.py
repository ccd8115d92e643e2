"""Makes MLPs use CRReLU's fused gated product, and its recomputation in the backward pass.

The MLP's class is replaced by a class of the same name with another forward, as in `hidden`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from crrelu_llm.kernels.recompute import recomputing
from crrelu_llm.patching.modules.hidden import fingerprint, gated_mlp, set_class

_MARK = "_unfused"


def _llama(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


def _llama4(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.activation_fn(self.gate_proj(x), self.up_proj(x)))


def _phi3(self: Any, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return self.down_proj(self.activation_fn(gate, up))


def _experts(self: Any, gate_up_out: Tensor) -> Tensor:
    gate, up = gate_up_out.chunk(2, dim=-1)
    return self.act_fn(gate, up)


def _lfm2(self: Any, x: Tensor) -> Tensor:
    return self.w2(self.act_fn(self.w1(x), self.w3(x)))


# By the method and the fingerprint of its source (see `hidden.fingerprint`): the same computation, with the
# activation and the product in one call. Other MLPs keep their forward, and multiply themselves.
FUSED: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("forward", "1dcfd3ff5c0d"): _llama,  # and 80 more families of transformers 5.23
    ("forward", "341f91cfeddb"): _llama4,
    ("forward", "97374bb82467"): _phi3,  # GLM, GLM-4
    ("forward", fingerprint(gated_mlp)): _lfm2,
    ("_apply_gate", "b717e28d7e17"): _experts,  # fused experts, unless their implementation is `eager`
}


def fuse(model: nn.Module, paths: Iterable[str], recompute: bool = False, product: bool = True) -> None:
    """Makes the owners of CRReLU activations call the fused gated product where their forward is known, in place.

    Args:
        model: The model that `paths` start from.
        paths: The paths of its CRReLU activations. Modules that are already fused do not change.
        recompute: Also recompute the activation in the backward pass instead of storing it (see `kernels.recompute`).
        product: False leaves the product to the MLP, even where it was fused: a hook then sees the activation alone.
    """
    for path in paths:
        owner = model.get_submodule(path.rpartition(".")[0])
        original = owner.__dict__.get(_MARK, type(owner))
        recompute_too = recompute or getattr(type(owner), "recomputes", False)
        cls = _class(original, recompute_too, product)
        if cls is not type(owner):
            owner.__dict__[_MARK] = original
            set_class(owner, cls)


def unfuse(model: nn.Module, paths: Iterable[str]) -> None:
    """Undoes `fuse`, in place.

    Args:
        model: The model that `paths` start from.
        paths: As for `fuse`.
    """
    for path in paths:
        owner = model.get_submodule(path.rpartition(".")[0])
        original = owner.__dict__.pop(_MARK, None)
        if original is not None:
            set_class(owner, original)


@functools.cache
def _class(cls: type, recompute: bool, product: bool = True) -> type:
    """The fused class for an owner of this class; the class itself where fusing gains nothing."""
    changes: dict[str, Any] = {}
    for method in ("forward", "_apply_gate") if product else ():
        fused = FUSED.get((method, _source(getattr(cls, method, None))))
        if fused is not None:
            changes[method] = fused
    if recompute:
        changes |= {"forward": _recomputing(changes.get("forward", cast(Any, cls).forward)), "recomputes": True}
    if not changes:
        return cls

    def reduce(self: Any, protocol: Any) -> Any:  # a class made at run time cannot be found by its name
        return _rebuild, (cls, recompute, product), self.__dict__

    return type(cls.__name__, (cls,), {**changes, "__module__": cls.__module__, "__reduce_ex__": reduce})


def _source(function: Any) -> str:
    """A function's fingerprint; a wrapper gets none, because its source would be that of the wrapped function."""
    try:
        return "" if function is None or inspect.unwrap(function) is not function else fingerprint(function)
    except (OSError, TypeError, SyntaxError):  # no source: compiled, or defined by hand
        return ""


def _rebuild(cls: type, recompute: bool, product: bool) -> Any:
    made: Any = _class(cls, recompute, product)
    return made.__new__(made)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_and_forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        with recomputing():
            return forward(self, *args, **kwargs)

    return forward_and_forget
