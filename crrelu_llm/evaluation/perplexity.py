"""Perplexity of a causal LM on blocks of tokens."""

from typing import Any

import torch
from torch import Tensor

from crrelu_llm.evaluation.measured import exponential


def perplexity(model: Any, blocks: Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood of all tokens except the first of each block.

    Args:
        model: A causal LM; its training or evaluation mode is restored afterwards.
        blocks: Token ids, `(blocks, tokens)`, int64.
        batch_size: Blocks per forward pass.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in blocks.split(batch_size):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    model.train(was_training)
    return exponential(total / count)
