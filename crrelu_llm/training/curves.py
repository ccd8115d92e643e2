"""The curve of an activation of a model, for plots: the mean over its channels."""

from typing import Any

import torch

from crrelu_llm.activation import AFFINE, CRReLU
from crrelu_llm.training.optimizer import epsilon_modules
from crrelu_llm.training.processes import whole_values

POINTS = torch.linspace(-4, 3, 71)


@torch.no_grad()
def curves(model: Any) -> dict[str, list[float]]:
    """The values of CRReLU at `POINTS`, averaged over channels, for the first, a middle and the last site of a model.

    Uses the present ε, centre, width, scale, shift, gain and offset. If these are sharded, every process must call
    this function.
    """
    modules = epsilon_modules(model)
    paths = list(modules)
    chosen = dict.fromkeys(paths[index] for index in (0, len(paths) // 2, -1)) if paths else {}
    return {path: _curve(modules[path]).tolist() for path in chosen}


def _curve(module: CRReLU) -> torch.Tensor:
    values = whole_values(
        {name: getattr(module, name) for name in ("epsilon", *(AFFINE if module.is_calibrated else ()))}
    )
    center, width = (float(getattr(module, name, start)) for name, start in (("center", 0.0), ("width", 1.0)))
    t = (POINTS[:, None] + values.get("shift", 0.0)) * values.get("scale", 1.0)
    v = (t - center) / width
    value = torch.relu(t) + values["epsilon"] * width * v * torch.exp(-0.5 * v * v)
    return (values.get("gain", 1.0) * value + values.get("offset", 0.0)).mean(1)
