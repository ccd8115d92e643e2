"""The activations that `bench mlp` and `bench train` compare, as patches of a model."""

from crrelu_llm.patching.config import PatchConfig

NATIVE, GELU, CRRELU, RECOMPUTE = "native", "gelu", "crrelu", "crrelu, recompute"


def arms(epsilon_per: str) -> dict[str, PatchConfig | None]:
    """Name -> patch; None for the unpatched model. No arm is calibrated, so that only the activation is measured."""
    return {
        NATIVE: None,
        GELU: PatchConfig("gelu", calibration="none"),
        CRRELU: PatchConfig("crrelu", epsilon_per=epsilon_per, calibration="none"),
        RECOMPUTE: PatchConfig("crrelu", epsilon_per=epsilon_per, calibration="none", recompute_activation=True),
    }


def backend_of(name: str) -> str:
    """The `backend` field of a case; torch's own activations have no choice of backend."""
    from crrelu_llm.kernels import choice

    return (choice.forced() or "auto") if name in (CRRELU, RECOMPUTE) else "torch"
