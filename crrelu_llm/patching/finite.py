"""Finds where a broken checkpoint computes NaN, before anything is made from it."""

from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.errors import InputError


def require_finite(model: nn.Module, input_ids: Tensor) -> None:
    """Runs a model on a few tokens and names the first module whose output is NaN.

    Args:
        model: A causal LM.
        input_ids: `(batch, tokens)`, int64.

    Raises:
        InputError: There is one.
    """
    names = {module: name for name, module in model.named_modules() if next(module.children(), None) is None}
    hooks = [module.register_forward_hook(lambda m, _, output: _check(names[m], output)) for module in names]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = model.get_input_embeddings().weight.device  # type: ignore[operator]
            model(input_ids=input_ids.to(device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _check(name: str, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and output.isnan().any():
        raise InputError(
            f"{name}: its output on ordinary text is not a number: the checkpoint is broken there or needs a wider "
            "dtype; nothing has been written"
        )
