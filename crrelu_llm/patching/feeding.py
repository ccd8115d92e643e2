"""Runs a model on token ids or on the pixels of images, to inspect it."""

from typing import Any

import torch
from torch import Tensor, nn


def run_on(model: nn.Module, batch: Tensor, head: bool = True) -> Any:
    """Runs a model.

    Args:
        model: A language model, or an image model.
        batch: Token ids, `(batch, tokens)`, int64; or pixels, `(batch, channels, height, width)`, of a floating dtype;
            on the model's device.
        head: Whether to run the head of a language model too, which takes most of the memory.

    Returns:
        The model's outputs.
    """
    if batch.is_floating_point():
        dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
        return model(pixel_values=batch.to(dtype))
    if not head:
        model = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return model(input_ids=batch, use_cache=False)


def batch_size(batch: Tensor) -> int:
    """How many rows go through a model at once when only activations are needed."""
    return 32 if batch.is_floating_point() else 4
