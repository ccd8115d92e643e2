"""The activations that `bench mlp` and `bench train` compare, as patches of a model."""

from dataclasses import fields
from typing import Any

from crrelu_llm.patching.swap import PatchConfig

NATIVE, GELU, CRRELU, RECOMPUTE = "native", "gelu", "crrelu", "crrelu, recompute"


def arms(epsilon_per: str) -> dict[str, PatchConfig | None]:
    """Name -> patch; None for the model as it is. No arm is calibrated: that changes neither time nor memory."""
    options: dict[str, Any] = {"epsilon_per": epsilon_per}
    found: dict[str, PatchConfig | None] = {
        NATIVE: None,
        GELU: PatchConfig("gelu"),
        CRRELU: PatchConfig("crrelu", **options),
    }
    if "recompute_activation" in {entry.name for entry in fields(PatchConfig)}:
        found[RECOMPUTE] = PatchConfig("crrelu", **options | {"recompute_activation": True})
    return found


def backend_of(name: str) -> str:
    """The case's `backend`: torch's own activations have none to choose."""
    from crrelu_llm.kernels import choice

    return (choice.forced() or "auto") if name in (CRRELU, RECOMPUTE) else "torch"
