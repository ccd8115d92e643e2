"""Families that compute the MLP's activation inside a method: replaces the method, so that a child computes it."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from crrelu_llm.errors import InputError

# The child that an exposed activation becomes.
ATTRIBUTE = "act_fn"
# Functions that a family stores as an attribute instead of a module (Lfm2MoeExperts.act_fn), and their names.
FUNCTIONS: dict[Callable, str] = {
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
    nn.functional.relu: "relu",
    torch.relu: "relu",
}


class SigmoidGate(nn.Module):
    """`x · sigmoid(α·x)`: SiLU for α = 1, close to GELU for α = 1.702."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(x * self.alpha)


class SoftcappedSiLU(nn.Module):
    """`c · tanh(x/c) · sigmoid(x)`: SiLU with its linear factor bounded by the softcap c."""

    def __init__(self, softcap: float):
        super().__init__()
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return torch.tanh(x / self.softcap) * self.softcap * torch.sigmoid(x)


def gated_mlp(self: Any, x: Tensor) -> Tensor:
    """The forward of LFM2's MLP, with its activation as a child."""
    return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


def _clamped_silu(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = _clamped(gate_up.chunk(2, dim=-1), self.swiglu_limit)
    return self.act_fn(gate) * up


def _clamped_pairs(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = _clamped((gate_up[..., ::2], gate_up[..., 1::2]), self.limit)
    return (up + 1) * self.act_fn(gate)


def _clamped_halves(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = _clamped(gate_up.chunk(2, dim=-1), self.swiglu_limit)
    return (up + 1) * self.act_fn(gate)


def _clamped_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    return self.down_proj(_clamped_halves(self, self.gate_up_proj(hidden_states)))


def _clamped(gate_and_up: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    gate, up = gate_and_up
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def _softcapped(self: Any, gate: Tensor, up: Tensor) -> Tensor:
    return (self.act_fn(gate.float()) * self.up_softcap(up.float())).to(gate.dtype)


def _time_mixed(self: Any, hidden: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor] | None]:
    """RWKV's feed-forward: `hidden` and the token before it, mixed per channel, feed the key and the receptance."""
    previous = None if state is None else state[0][:, :, self.layer_id]
    if previous is not None and hidden.size(1) == 1:
        shifted = previous
    else:
        shifted = self.time_shift(hidden)
        if previous is not None:
            shifted[:, 0] = previous
    mixed = [hidden * mix + shifted * (1 - mix) for mix in (self.time_mix_key, self.time_mix_receptance)]
    value = self.value(self.act_fn(self.key(mixed[0])))
    gated = torch.sigmoid(self.receptance(mixed[1])) * value
    if state is not None:
        state[0][:, :, self.layer_id] = hidden[:, -1]
    return gated, state


def _named(name: str) -> Callable[[nn.Module], nn.Module]:
    def build(owner: nn.Module) -> nn.Module:
        from transformers.activations import ACT2FN

        return ACT2FN[name]

    return build


@dataclass(frozen=True)
class Hidden:
    """An activation inside a method.

    Attributes:
        method: The method of the family's class that computes it.
        replacement: The same method, which calls the child `act_fn`. It keeps clamps and other factors.
        activation: Builds the activation, bit for bit the original function, from the module that owns it.
        source: Fingerprint of the method that `replacement` was written for (see `fingerprint`).
    """

    method: str
    replacement: Callable[..., Any]
    activation: Callable[[Any], nn.Module]
    source: str


def _sigmoid_gate(owner: Any) -> nn.Module:
    return SigmoidGate(owner.alpha if hasattr(owner, "alpha") else owner.swiglu_alpha)


def _softcapped_silu(owner: Any) -> nn.Module:
    return SoftcappedSiLU(owner.gate_softcap.softcap)


_gated_silu_mlp = Hidden("forward", gated_mlp, _named("silu"), "45c95a82ba56")
# By the name of the class in transformers.
HIDDEN = {
    "Lfm2MLP": _gated_silu_mlp,
    "Lfm2MoeMLP": _gated_silu_mlp,
    "Lfm3MLP": _gated_silu_mlp,
    "GptOssExperts": Hidden("_apply_gate", _clamped_pairs, _sigmoid_gate, "298df0b754bd"),
    "MiniMaxM3VLDenseMLP": Hidden("forward", _clamped_mlp, _sigmoid_gate, "604ba80e1a69"),
    "MiniMaxM3VLExperts": Hidden("_apply_gate", _clamped_halves, _sigmoid_gate, "f0f9db7e3a03"),
    "HYV4Experts": Hidden("_apply_gate", _clamped_silu, _named("silu"), "05c813210d96"),
    "RwkvFeedForward": Hidden("forward", _time_mixed, _named("relu2"), "be3c33b80d62"),
    "Inkling2SoftcappedSwiGLU": Hidden("forward", _softcapped, _softcapped_silu, "a39012038ebe"),
}


def hidden_activation(owner: nn.Module) -> tuple[str, nn.Module] | None:
    """The attribute and the activation that `expose` would add to a module, or None where it has nothing hidden.

    Raises:
        InputError: This release of transformers computes the activation in an unknown way.
    """
    for attribute, value in owner.__dict__.items():
        for function, name in FUNCTIONS.items():
            if value is function and not attribute.startswith("_"):
                return attribute, _named(name)(owner)
    hidden = None if is_exposed(owner) else _entry(cast(Any, type(owner)))
    return (ATTRIBUTE, hidden.activation(owner)) if hidden else None


def is_exposed(owner: nn.Module) -> bool:
    """Whether `expose` has turned an activation of this module into a child."""
    return "_exposed" in owner.__dict__


def expose(model: nn.Module, paths: Iterable[str]) -> None:
    """Turns hidden activations into children of their modules, in place; the model's outputs do not change.

    Args:
        model: The model that `paths` start from, on any device.
        paths: The paths that the activations will have; a path that is already a module does not change.

    Raises:
        InputError: The activation of a module is unknown.
    """
    for path in paths:
        owner_path, _, attribute = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        if attribute in owner._modules:
            continue
        found = hidden_activation(owner)
        if found is None or found[0] != attribute:
            raise InputError(f"{path}: {type(owner).__name__} has no activation that can be made a module")
        before: Any = owner.__dict__.get(attribute)
        if before is None:
            before = type(owner)
            set_class(owner, _exposing(before))
        setattr(owner, attribute, found[1].train(owner.training))
        owner.__dict__["_exposed"] = before  # the function or the class that conceal restores


def conceal(model: nn.Module, paths: Iterable[str]) -> None:
    """Undoes `expose`, in place, whatever the present activation is; restores the module tree.

    Args:
        model: The model that `paths` start from.
        paths: As for `expose`; a path that `expose` did not change stays unchanged.
    """
    for path in paths:
        owner_path, _, attribute = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        if not is_exposed(owner):
            continue
        delattr(owner, attribute)
        before = owner.__dict__.pop("_exposed")
        if isinstance(before, type):
            set_class(owner, before)
        else:
            setattr(owner, attribute, before)


@functools.cache
def _entry(cls: type) -> Hidden | None:
    """The table's entry for a class or one of its base classes, if the method is still that class's own."""
    for base in cls.__mro__:
        hidden = HIDDEN.get(base.__name__)
        if hidden and base.__module__.startswith("transformers.models."):
            method = getattr(base, hidden.method, None)
            if getattr(cls, hidden.method, None) is not method:
                return None
            if method is None or fingerprint(method) != hidden.source:
                raise InputError(
                    f"{base.__name__}.{hidden.method} of this release of transformers is not the one that crrelu_llm "
                    "knows how to replace; upgrade crrelu_llm, or install a version of transformers that it supports"
                )
            return hidden
    return None


def fingerprint(method: Callable) -> str:
    """Fingerprint of a function's source without annotations, comments and white space; it shows when a replacement
    is out of date.

    Raises:
        OSError: The function has no source.
        SyntaxError: The function is a lambda.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return hashlib.sha256("".join(ast.unparse(tree).split()).encode()).hexdigest()[:12]


@functools.cache
def _exposing(cls: type) -> type:
    # The class keeps its name, so that code that looks at names (parallel plans, layers that are not split) finds it.
    # A class, not a method bound to the instance: deep copies work, and torch.compile sees nothing unusual.
    hidden = _entry(cls)
    assert hidden is not None
    return type(cls.__name__, (cls,), {hidden.method: hidden.replacement, "__module__": cls.__module__})


def set_class(owner: Any, cls: Any) -> None:
    """Gives a module another class, in place, even where a hook of accelerate keeps its forward."""
    owner.__class__ = cls
    if "_old_forward" in owner.__dict__:  # a hook of accelerate calls the method that it found
        owner._old_forward = MethodType(cls.forward, owner)
