"""Fused experts: the error of a layer's output with the best single ε, and with the whole fit; tiny random models.

    python moe.py > moe.json

The error is the root mean square of (patched − original) over that of the original, of each MoE block given the
original's inputs, on tokens that were not calibrated to.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
import torch
from families import family_model

from crrelu_llm import patch, unpatch

GENERATOR = torch.Generator().manual_seed(2)
CALIBRATION = torch.randint(3, 64, (64, 32), generator=GENERATOR)
HELD_BACK = torch.randint(3, 64, (8, 32), generator=GENERATOR)


@torch.no_grad()
def blocks_of(model):
    """Inputs and outputs of every MoE block of a model on the tokens that are held back."""
    kept = {}

    def keep(name):
        return lambda module, args, output: kept.update(
            {name: (args, output[0] if isinstance(output, tuple) else output)}
        )

    owners = {
        name: module for name, module in model.named_modules() if name.endswith(".mlp") and hasattr(module, "experts")
    }
    hooks = [module.register_forward_hook(keep(name)) for name, module in owners.items()]
    model(input_ids=HELD_BACK)
    for hook in hooks:
        hook.remove()
    return kept


@torch.no_grad()
def error(model, kept):
    """Mean over the blocks."""
    found = []
    for name, (args, wanted) in kept.items():
        output = model.get_submodule(name)(*args)
        output = output[0] if isinstance(output, tuple) else output
        found.append(((output - wanted).norm() / wanted.norm()).item())
    return sum(found) / len(found)


result = {}
for family in ("mixtral", "qwen2_moe"):
    model = family_model(family)
    kept = blocks_of(model)
    alone = {}
    for epsilon in torch.linspace(-1, 4, 51).tolist():
        patch(model, calibration="none", epsilon_init=epsilon)
        alone[round(epsilon, 2)] = error(model, kept)
        unpatch(model)
    best = min(alone, key=alone.get)
    patch(model, blocks=CALIBRATION, calibration="fit", epsilon_per="channel")
    result[family] = {
        "plain, ε = 0.01": None,
        "best ε alone": best,
        "error with it": alone[best],
        "fit": error(model, kept),
    }
    unpatch(model)
    patch(model, calibration="none")
    result[family]["plain, ε = 0.01"] = error(model, kept)
print(json.dumps(result, indent=1, ensure_ascii=False))
