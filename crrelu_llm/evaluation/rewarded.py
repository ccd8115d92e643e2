"""Evaluates a reward model: accuracy, margin and loss on preference pairs, with a value per pair."""

from typing import Any

import numpy as np
import torch

from crrelu_llm.evaluation.items import batches, columns_of, evaluating, pair_metrics
from crrelu_llm.evaluation.measured import SHOWN, Evaluated, ItemText, wins


def evaluate_reward(trainer: Any) -> Evaluated:
    """Loss of the pairs, accuracy and margin of the rewards; items are the pairs.

    The loss is −log σ(chosen − rejected − the margin of the row), plus the trainer's `center_rewards_coefficient`
    times (chosen + rejected)².
    """
    rows = []
    with evaluating(trainer) as model:
        for batch in batches(trainer):
            own = batch.pop("margin", None)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                rewards = model(**batch, use_cache=False).logits.squeeze(-1).double()
            chosen, rejected = rewards.chunk(2)  # a batch is [chosen, rejected]
            lengths = [half.double() for half in batch["attention_mask"].sum(1).chunk(2)]
            own = torch.zeros_like(chosen) if own is None else own.double()
            row = torch.stack([chosen, rejected, *lengths, own], dim=1)
            rows.append(trainer.accelerator.gather_for_metrics(row).cpu())
    chosen, rejected, chosen_tokens, rejected_tokens, own = torch.cat(rows).numpy().T
    metrics = pair_metrics(chosen, rejected, chosen_tokens, rejected_tokens)
    margins = chosen - rejected
    centre = trainer.args.center_rewards_coefficient or 0.0
    losses = np.logaddexp(0.0, -(margins - own)) + centre * (chosen + rejected) ** 2
    items = {"loss": losses, "reward_accuracy": wins(margins), "reward_margin": margins}
    return metrics | {"loss": float(losses.mean())}, {name: values.tolist() for name, values in items.items()}


def scored_texts(trainer: Any) -> list[ItemText]:
    """For each pair, the common beginning of its two texts as the prompt, and the rest of each text as an option."""
    names = ("chosen_ids", "rejected_ids")
    if not set(names) <= columns_of(trainer.eval_dataset):
        return []
    decode, shown = trainer.processing_class.decode, []
    for chosen, rejected in zip(*(trainer.eval_dataset[name] for name in names), strict=True):
        alike = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), 0)
        answers = [decode(side[alike : alike + SHOWN])[:SHOWN] for side in (chosen, rejected)]
        shown.append(ItemText(prompt=decode(chosen[:alike])[-SHOWN:], options=answers))
    return shown
