"""Stand-ins for libraries that put kernels for whole MLPs into a model, and need a GPU or a network for it."""

import sys
from types import MethodType, ModuleType

from torch import nn


def fast_mlp(self, x):
    """A kernel for a whole gated MLP: it knows SiLU, and never looks at the activation module."""
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def replace_mlps(model):
    """Gives every MLP of a Llama the kernel, as Liger and hub kernels do: on the instances."""
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(fast_mlp, layer.mlp)


def install_liger(monkeypatch):
    """A liger_kernel with the one function that transformers calls; returns the options of each call."""
    calls = []

    def apply(model, swiglu=True, rms_norm=True, **others):
        calls.append({"swiglu": swiglu, "rms_norm": rms_norm, **others})
        if swiglu:
            replace_mlps(model)

    package = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return calls
