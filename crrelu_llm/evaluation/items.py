"""Evaluates a trainer's model on its evaluation data, with a value for every item so that arms can be paired."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.measured import SHOWN, WEIGHTS, Evaluated, ItemText, exponential, wins
from crrelu_llm.evaluation.metrics import LanguageModelling, PairwisePreference

# The columns of a batch that are not inputs of the model.
_NOT_INPUTS = {"completion_mask", "labels", "label", "ref_chosen_logps", "ref_rejected_logps", "ref_logps"} | {
    "ref_KL_logps"
}


def evaluate_sft(trainer: Any) -> Evaluated:
    """Loss, perplexity and token accuracy; items are the documents, with their number of scored tokens.

    If all documents begin with the same scored tokens, such as those of a chat template, the metrics contain the loss
    of the other tokens too.

    Raises:
        InputError: The evaluation data is packed, and there is more than one process.
    """
    alone = trainer.accelerator.num_processes == 1
    if not alone and (trainer.args.packing if trainer.args.eval_packing is None else trainer.args.eval_packing):
        raise InputError("packed data can be evaluated by one process only; set eval_packing: false")
    parts: dict[str, list[Tensor]] = {"negative_log_likelihood": [], "tokens": [], "correct": []}
    parts |= {"own_negative_log_likelihood": [], "own_tokens": []}
    shared = _common_beginning(trainer)
    for batch, outputs in forward_passes(trainer):
        mask = outputs.label_mask
        documents, begins = _documents(batch, mask), _positions(batch, mask) < shared
        nll, tokens = -outputs.log_probs.double(), mask.long()
        own = [values.masked_fill(begins, 0) for values in (nll, tokens)]
        found = (nll, tokens, outputs.is_top1.long(), *own)
        for part, values in zip(parts.values(), found, strict=True):
            sums = _sum_by(values, documents)
            # A single process has nothing to gather, and gather_for_metrics would cut the last batch to its number of
            # rows, each of which may hold several documents.
            part.append((sums if alone else trainer.accelerator.gather_for_metrics(sums)).cpu())
    columns = {name: torch.cat(values).numpy() for name, values in parts.items()}
    keep = columns["tokens"] > 0
    columns = {name: values[keep] for name, values in columns.items()}
    own_nll, own_tokens = columns.pop("own_negative_log_likelihood").sum(), columns.pop("own_tokens").sum()
    metrics = LanguageModelling(keep_in_memory=True).compute(**columns)
    if 0 < own_tokens < columns["tokens"].sum():
        metrics["loss_after_beginning"] = float(own_nll / own_tokens)
    loss = columns["negative_log_likelihood"] / columns["tokens"]
    accuracy = columns["correct"] / columns["tokens"]
    return metrics, {"loss": loss.tolist(), "token_accuracy": accuracy.tolist(), WEIGHTS: columns["tokens"].tolist()}


def evaluate_dpo(trainer: Any) -> Evaluated:
    """DPO loss, reward accuracy and margin; items are the pairs."""
    rows = []
    for batch, outputs in forward_passes(trainer):
        mask = batch["completion_mask"][:, 1:]
        lengths = mask.sum(1)
        whole, logps = (_summed(outputs.log_probs, mask, alpha) for alpha in (None, trainer.ld_alpha))
        if "ref_chosen_logps" in batch:
            reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
        rewards = trainer.beta * (logps - reference.double())
        halves = [value.chunk(2) for value in (rewards, lengths, whole)]  # a batch is [chosen, rejected]
        row = torch.stack([half.double() for pair in halves for half in pair], dim=1)
        rows.append(trainer.accelerator.gather_for_metrics(row).cpu())
    chosen, rejected, chosen_tokens, rejected_tokens, chosen_logps, _ = torch.cat(rows).numpy().T
    metrics = pair_metrics(chosen, rejected, chosen_tokens, rejected_tokens)
    margins = chosen - rejected
    items = {"reward_accuracy": wins(margins).tolist(), "reward_margin": margins.tolist()}
    metrics["perplexity"] = exponential(-chosen_logps.sum() / max(chosen_tokens.sum(), 1))
    if _is_plain(trainer):
        losses = np.logaddexp(0.0, -margins)  # −log σ(margin)
        items["loss"] = losses.tolist()
        metrics["loss"] = float(losses.mean())
    else:
        with every_row_in_order(trainer.args):
            metrics["loss"] = trainer.evaluate()["eval_loss"]
    return metrics, items


def _summed(log_probs: Tensor, mask: Tensor, alpha: float | None) -> Tensor:
    """The log-probability of each answer, `(answers,)`; a longer answer's tokens beyond the other's count `alpha`."""
    log_probs = log_probs[:, -mask.size(1) :].double()
    if alpha is None:
        return log_probs.sum(1)
    chosen, rejected = mask.sum(1).chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    return (log_probs * torch.where(mask.cumsum(1) > shared[:, None], alpha, 1.0)).sum(1)


def _is_plain(trainer: Any) -> bool:
    """Whether DPO's loss is −log σ(margin)."""
    plain = trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0]
    plain = plain and trainer.f_divergence_type == "reverse_kl"
    return bool(plain and not trainer.label_smoothing and not trainer.use_weighting)


def pair_metrics(
    chosen: np.ndarray, rejected: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray
) -> dict[str, float]:
    """Accuracy and margin of the rewards, and the accuracy of "the longer answer wins"; all arrays are `(pairs,)`."""
    return PairwisePreference(keep_in_memory=True).compute(
        chosen_reward=chosen,
        rejected_reward=rejected,
        chosen_tokens=chosen_tokens.astype(int),
        rejected_tokens=rejected_tokens.astype(int),
    )


def document_texts(trainer: Any) -> list[ItemText]:
    """The beginning of each document.

    Empty if the data is a stream, or if several documents share a row.
    """
    columns = columns_of(trainer.eval_dataset)
    if "input_ids" not in columns or "seq_lengths" in columns:
        return []
    decode = trainer.processing_class.decode
    return [ItemText(prompt=decode(ids[: 2 * SHOWN])[:SHOWN], options=[]) for ids in trainer.eval_dataset["input_ids"]]


def pair_texts(trainer: Any) -> list[ItemText]:
    """The end of each pair's prompt, with the two answers as options, the chosen one first."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not set(names) <= columns_of(trainer.eval_dataset):
        return []
    decode = trainer.processing_class.decode
    return [
        ItemText(prompt=decode(prompt)[-SHOWN:], options=[decode(answer[:SHOWN])[:SHOWN] for answer in answers])
        for prompt, *answers in zip(*(trainer.eval_dataset[name] for name in names), strict=True)
    ]


def columns_of(data: Any) -> set[str]:
    """The columns of evaluation data; a stream has none."""
    return set(data.column_names or ()) if hasattr(data, "__len__") else set()


def computing_model(trainer: Any) -> Any:
    """The model to run: the wrapped one if it is sharded or runs in several processes."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return trainer.model_wrapped if sharded or trainer.accelerator.num_processes > 1 else trainer.model


@contextlib.contextmanager
def evaluating(trainer: Any) -> Iterator[Any]:
    """A context with the trainer's model in evaluation mode."""
    model = computing_model(trainer)
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def batches(trainer: Any) -> Iterator[Any]:
    """The evaluation batches in the order of the data, with a progress bar."""
    # `disable=False` in the main process would override the user's TQDM_DISABLE.
    quiet, args = {} if trainer.accelerator.is_main_process else {"disable": True}, trainer.args
    with every_row_in_order(args):
        loader = trainer.get_eval_dataloader()
    for batch in tqdm(loader, desc="Evaluating", **quiet):
        yield trainer._prepare_inputs(batch)


@contextlib.contextmanager
def every_row_in_order(args: Any) -> Iterator[None]:
    """A context without the options of training that transformers would apply to evaluation rows too.

    Persistent workers would keep the loader of an evaluation outside of such a context.
    """
    without = {"train_sampling_strategy": "sequential", "dataloader_drop_last": False}
    without["dataloader_persistent_workers"] = False
    kept = {name: getattr(args, name) for name in without}
    for name, value in without.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def forward_passes(trainer: Any) -> Iterator[tuple[Any, Any]]:
    """Every evaluation batch with the model's per-token log-probabilities (TRL's fused LM head: no full logits)."""
    with evaluating(trainer) as model:
        for inputs in batches(trainer):
            kwargs = {key: value for key, value in inputs.items() if key not in _NOT_INPUTS and key[:3] != "KL_"}
            labels = inputs.get("labels")
            if labels is None:
                labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)
            yield inputs, outputs


def _common_beginning(trainer: Any) -> int:
    """The number of tokens with which all documents begin; 0 where a row may hold several documents."""
    columns = columns_of(trainer.eval_dataset)
    if "input_ids" not in columns or "seq_lengths" in columns or len(trainer.eval_dataset) < 2:
        return 0
    documents = list(trainer.eval_dataset.with_format(None)["input_ids"])
    first, last = min(documents), max(documents)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def _positions(batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The index in its document of each predicted token."""
    positions = batch.get("position_ids")
    if positions is not None:
        return positions[:, 1:]
    return torch.arange(1, mask.size(1) + 1, device=mask.device).expand_as(mask)


def _documents(batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The index of the document of each scored position: the row or, in a flattened batch, the run of positions."""
    positions = batch.get("position_ids")
    if positions is not None and "attention_mask" not in batch:
        starts = (positions == 0).long().flatten().cumsum(0) - 1
        return starts.view_as(positions)[:, 1:]
    rows = torch.arange(mask.size(0), device=mask.device)
    return rows[:, None].expand_as(mask)


def _sum_by(values: Tensor, documents: Tensor) -> Tensor:
    total = values.new_zeros(int(documents.max()) + 1)
    return total.index_add(0, documents.flatten(), values.flatten())
