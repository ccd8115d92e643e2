"""Evaluates a KTO trainer's model on desirable and undesirable answers: loss, margin, accuracy; a value a prompt."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from crrelu_llm.evaluation.items import SHOWN, Evaluated, columns_of, computing_model, forward_passes
from crrelu_llm.evaluation.measured import wins

_ROUNDING = 1e-6  # of a log-probability that float32 has computed


def evaluate_kto(trainer: Any) -> Evaluated:
    """KTO loss, reward margin and accuracy; items are the prompts, in the order of their first answers.

    A reward is β·(log π − log π_ref) of an answer. The loss is that of KTO with the divergence from the reference
    estimated once, on all answers, each after the prompt of the one before it; training estimates it on each batch.
    An answer is told right where its reward is above that divergence (times β) and it is desirable, or below and it is
    not; a tie, up to float32's rounding, counts one half. The answers to one prompt are one item, their mean, as they
    are not independent. The divergence is held fixed: intervals do not know that it is an estimate.
    """
    rows, divergences = [], []
    with _neighbours(trainer):
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
                divergence = (mismatched - reference[1]).double()
                divergences.append(trainer.accelerator.gather_for_metrics(divergence).cpu())
    desirable, rewards, logps, lengths = torch.cat(rows).numpy().T
    baseline = trainer.beta * max(0.0, float(torch.cat(divergences).mean())) if divergences else 0.0
    gains = np.where(desirable > 0, 1.0, -1.0) * (rewards - baseline)
    weights = np.where(desirable > 0, trainer.desirable_weight, trainer.undesirable_weight)
    rounding = _ROUNDING * (1 + trainer.beta * np.abs(logps))
    columns = {
        "loss": weights * expit(-gains),
        "answer_accuracy": wins(np.where(np.abs(gains) <= rounding, 0.0, gains)),
        "reward_margin": _margins(rewards, desirable > 0),
    }
    groups = _groups(trainer, len(rewards))
    items = {name: [float(values[group].mean()) for group in groups] for name, values in columns.items()}
    metrics = {name: float(np.mean(values)) for name, values in items.items()}
    if desirable.any():
        tokens = max(lengths[desirable > 0].sum(), 1)
        metrics["perplexity"] = float(np.exp(min(-logps[desirable > 0].sum() / tokens, 700.0)))
    return metrics, items


@contextlib.contextmanager
def _neighbours(trainer: Any) -> Iterator[None]:
    """Within it, every answer of the evaluation data stands after the prompt of the next row, whatever the batches.

    TRL pairs them within batches of the training's size. Log-probabilities that were computed in advance are of its
    pairs, which then stay.
    """
    data = trainer.eval_dataset
    if not {"KL_completion_ids", "completion_ids"} <= columns_of(data) or "ref_KL_logps" in data.column_names:
        yield
        return
    answers = list(data["completion_ids"])
    rotated = data.remove_columns("KL_completion_ids").add_column("KL_completion_ids", [answers[-1], *answers[:-1]])
    trainer.eval_dataset = rotated
    try:
        yield
    finally:
        trainer.eval_dataset = data


def _groups(trainer: Any, count: int) -> list[list[int]]:
    """The rows of each prompt; of a stream each row by itself."""
    if "prompt_ids" not in columns_of(trainer.eval_dataset):
        return [[row] for row in range(count)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(trainer.eval_dataset["prompt_ids"]):
        groups.setdefault(tuple(prompt), []).append(row)
    return list(groups.values())


def _margins(rewards: np.ndarray, desirable: np.ndarray) -> np.ndarray:
    """Values whose mean is the mean reward of the desirable answers minus that of the others; NaN without either."""
    shares = [desirable.mean(), 1 - desirable.mean()]
    if not all(shares):
        return np.full(len(rewards), np.nan)
    return np.where(desirable, rewards / shares[0], -rewards / shares[1])


def answer_texts(trainer: Any) -> list[dict[str, Any]]:
    """What to show of each prompt: its end, and its answers as options, `right` where they are desirable."""
    data = trainer.eval_dataset
    if not {"prompt_ids", "completion_ids"} <= columns_of(data):
        return []
    decode = trainer.processing_class.decode
    return [
        {
            "prompt": decode(data[group[0]]["prompt_ids"])[-SHOWN:],
            "options": [decode(data[row]["completion_ids"][:SHOWN])[:SHOWN] for row in group],
            "right": [bool(data[row]["label"]) for row in group],
        }
        for group in _groups(trainer, len(data))
    ]
