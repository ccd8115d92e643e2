"""Evaluates a KTO trainer's model on desirable and undesirable answers: loss, margin, accuracy; a value an answer."""

from typing import Any

import numpy as np
import torch
from scipy.special import expit

from crrelu_llm.evaluation.items import SHOWN, Evaluated, columns_of, computing_model, forward_passes
from crrelu_llm.evaluation.measured import wins

_ROUNDING = 1e-6  # of a log-probability that float32 has computed


def evaluate_kto(trainer: Any) -> Evaluated:
    """KTO loss, reward margin and accuracy; items are the answers, in the order of the data as TRL unpairs it.

    A reward is β·(log π − log π_ref) of an answer. The loss is that of KTO with the divergence from the reference
    estimated once, on all answers (each after another one's prompt), where training estimates it on each batch; so it
    does not depend on the batch size. An answer is told right where its reward is above that divergence (times β) and
    it is desirable, or below and it is not; a tie, up to float32's rounding, counts one half.
    """
    rows, divergences = [], []
    for batch, outputs in forward_passes(trainer):
        logps, lengths = outputs.log_probs.double().sum(1), batch["completion_mask"][:, 1:].sum(1)
        reference = batch.get("ref_logps"), batch.get("ref_KL_logps")
        if reference[0] is None:
            reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        row = [batch["label"].double(), trainer.beta * (logps - reference[0].double()), logps, lengths.double()]
        rows.append(trainer.accelerator.gather_for_metrics(torch.stack(row, dim=1)).cpu())
        if trainer.calculate_KL:
            with torch.no_grad(), trainer.compute_loss_context_manager():
                mismatched = trainer._compute_kl_logps(computing_model(trainer), batch)
            divergences.append(trainer.accelerator.gather_for_metrics((mismatched - reference[1]).double()).cpu())
    desirable, rewards, logps, lengths = torch.cat(rows).numpy().T
    baseline = trainer.beta * max(0.0, float(torch.cat(divergences).mean())) if divergences else 0.0
    signs = np.where(desirable > 0, 1.0, -1.0)
    gains = signs * (rewards - baseline)
    rounding = _ROUNDING * (1 + trainer.beta * np.abs(logps))
    weights = np.where(desirable > 0, trainer.desirable_weight, trainer.undesirable_weight)
    items = {
        "loss": (weights * expit(-gains)).tolist(),
        "answer_accuracy": wins(np.where(np.abs(gains) <= rounding, 0.0, gains)).tolist(),
        "reward_margin": _margins(rewards, desirable > 0).tolist(),
    }
    metrics = {name: float(np.mean(values)) for name, values in items.items()}
    if desirable.any():
        tokens = max(lengths[desirable > 0].sum(), 1)
        metrics["perplexity"] = float(np.exp(min(-logps[desirable > 0].sum() / tokens, 700.0)))
    return metrics, items


def _margins(rewards: np.ndarray, desirable: np.ndarray) -> np.ndarray:
    """Values whose mean is the mean reward of the desirable answers minus that of the others; NaN without either."""
    shares = [desirable.mean(), 1 - desirable.mean()]
    if not all(shares):
        return np.full(len(rewards), np.nan)
    return np.where(desirable, rewards / shares[0], -rewards / shares[1])


def answer_texts(trainer: Any) -> list[dict[str, Any]]:
    """What to show of each answer: its prompt, and the answer as the only option."""
    names = ("prompt_ids", "completion_ids")
    if not set(names) <= columns_of(trainer.eval_dataset):
        return []
    decode = trainer.processing_class.decode
    return [
        {"prompt": decode(prompt)[-SHOWN:], "options": [decode(answer[:SHOWN])[:SHOWN]]}
        for prompt, answer in zip(*(trainer.eval_dataset[name] for name in names), strict=True)
    ]
