"""Evaluates a KTO trainer's model on desirable and undesirable answers: loss, margin, accuracy, per prompt."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from crrelu_llm.evaluation.items import columns_of, computing_model, forward_passes
from crrelu_llm.evaluation.measured import SHOWN, Evaluated, ItemText, exponential, linearised, wins

_ROUNDING = 1e-6  # relative rounding error of a log-probability in float32


def evaluate_kto(trainer: Any) -> Evaluated:
    """KTO loss, reward margin and accuracy; items are the prompts, in the order of their first answers.

    The reward of an answer is β·(log π − log π_ref). The loss is KTO's, but the divergence from the reference is
    estimated once, on all answers, each placed after the prompt of the next row; training estimates it on each batch.
    An answer counts as right if it is desirable and its reward is above the divergence (times β), or if it is
    undesirable and its reward is below; a tie, up to float32's rounding, counts one half. The answers to one prompt
    are not independent, so a prompt is one item (see `by_prompt`). The intervals do not include the error of the
    estimated divergence.
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
    }
    groups = _groups(trainer, len(rewards))
    items = by_prompt(columns, groups) | {"reward_margin": margins(rewards, desirable > 0, groups)}
    metrics = {name: float(np.mean(values)) for name, values in items.items()}
    if desirable.any():
        tokens = max(lengths[desirable > 0].sum(), 1)
        metrics["perplexity"] = exponential(-logps[desirable > 0].sum() / tokens)
    return metrics, items


@contextlib.contextmanager
def _neighbours(trainer: Any) -> Iterator[None]:
    """A context in which each answer of the evaluation data follows the prompt of the next row, whatever the batches.

    TRL pairs answers and prompts within batches of the training batch size. Log-probabilities that were computed in
    advance belong to TRL's pairs, which are then kept.
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
    """The rows of each prompt; in a stream, each row is a group."""
    if "prompt_ids" not in columns_of(trainer.eval_dataset):
        return [[row] for row in range(count)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(trainer.eval_dataset["prompt_ids"]):
        groups.setdefault(tuple(prompt), []).append(row)
    return list(groups.values())


def by_prompt(columns: dict[str, np.ndarray], groups: list[list[int]]) -> dict[str, list[float]]:
    """The values of each prompt: the means of its answers.

    Args:
        columns: The values of the answers, `(answers,)` each.
        groups: The answers of each prompt.
    """
    return {name: [float(values[group].mean()) for group in groups] for name, values in columns.items()}


def margins(rewards: np.ndarray, desirable: np.ndarray, groups: list[list[int]]) -> list[float]:
    """Values of the prompts with the reward margin as their mean; NaN if all answers are of one kind.

    The margin is the mean of the desirable answers less that of the others. Both are ratios of sums over prompts, so a
    prompt's value is `linearised`: a reward that all answers have in common does not count.
    """
    if desirable.all() or not desirable.any():
        return [float("nan")] * len(groups)
    means = []
    for kind in (desirable, ~desirable):
        sums = [float(rewards[group][kind[group]].sum()) for group in groups]
        means.append(np.array(linearised(sums, [int(kind[group].sum()) for group in groups]), dtype=float))
    return (means[0] - means[1]).tolist()


def answer_texts(trainer: Any) -> list[ItemText]:
    """The end of each prompt, with its answers as options; the desirable ones are right."""
    data = trainer.eval_dataset
    if not {"prompt_ids", "completion_ids"} <= columns_of(data):
        return []
    decode = trainer.processing_class.decode
    return [
        ItemText(
            prompt=decode(data[group[0]]["prompt_ids"])[-SHOWN:],
            options=[decode(data[row]["completion_ids"][:SHOWN])[:SHOWN] for row in group],
            right=[bool(data[row]["label"]) for row in group],
        )
        for group in _groups(trainer, len(data))
    ]
