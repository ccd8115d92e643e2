"""Perplexity of blocks: against transformers' own loss, and independent of the batch."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, token_ids
from torch import nn

from crrelu_llm.evaluation.perplexity import perplexity


def test_it_is_the_exponential_of_transformers_loss():
    model, blocks = tiny_model("llama"), token_ids(5, 16)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    for batch_size in (1, 2, 5, 8):
        assert perplexity(model, blocks, batch_size) == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_mode_of_the_model_is_kept():
    model, blocks = tiny_model("gpt2", resid_pdrop=0.5), token_ids(2, 16)
    wanted = perplexity(model, blocks)
    model.train()
    assert perplexity(model, blocks) == wanted  # dropout is off while it measures
    assert model.training


class Constant(nn.Module):
    """A model that gives every token the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_hand_numbers():
    blocks = torch.tensor([[0, 1, 1], [2, 0, 1]])
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    # The first token of a block is not predicted: what is left is 1, 1, 0, 1
    wanted = (0.25 * 0.25 * 0.5 * 0.25) ** (-1 / 4)
    assert perplexity(Constant(probabilities.log()), blocks) == pytest.approx(wanted, rel=1e-6)


def test_a_destroyed_model_has_a_finite_perplexity():
    assert math.isfinite(perplexity(Constant(torch.tensor([1e6, 0.0])), torch.ones(1, 4, dtype=torch.long)))
