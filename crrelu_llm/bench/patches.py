"""The activations that `bench mlp` and `bench train` compare, as patches of a model."""

from dataclasses import dataclass
from typing import Any

from crrelu_llm.activation import AFFINE
from crrelu_llm.patching.config import PatchConfig
from crrelu_llm.patching.patch import patch

NATIVE, GELU, CRRELU, RECOMPUTE = "native", "gelu", "crrelu", "crrelu, recompute"
CALIBRATED = "crrelu, calibrated"


@dataclass(frozen=True)
class Arm:
    """One activation.

    Attributes:
        config: The patch; None for the unpatched model.
        calibrated: Whether each channel has the four numbers of a calibration. They keep their start values, on which
            the time does not depend.
    """

    config: PatchConfig | None
    calibrated: bool = False

    def apply(self, model: Any) -> None:
        """Patches a model in place."""
        if self.config is None:
            return
        sites = patch(model, self.config).sites
        for site in sites if self.calibrated else ():
            module = model.get_submodule(site["path"])
            module._add_buffers(AFFINE, site["num_channels"], module.epsilon.device)
            module.reset_parameters(AFFINE)


def arms(epsilon_per: str) -> dict[str, Arm]:
    """Name -> arm. No arm is fitted to a text, so that only the activation is measured."""
    crrelu = PatchConfig("crrelu", epsilon_per=epsilon_per, calibration="none")
    recompute = PatchConfig("crrelu", epsilon_per=epsilon_per, calibration="none", recompute_activation=True)
    return {
        NATIVE: Arm(None),
        GELU: Arm(PatchConfig("gelu", calibration="none")),
        CRRELU: Arm(crrelu),
        CALIBRATED: Arm(crrelu, calibrated=True),
        RECOMPUTE: Arm(recompute),
    }


def backend_of(name: str) -> str:
    """The `backend` field of a case; torch's own activations have no choice of backend."""
    from crrelu_llm.kernels import choice

    return (choice.forced() or "auto") if name in (CRRELU, CALIBRATED, RECOMPUTE) else "torch"
