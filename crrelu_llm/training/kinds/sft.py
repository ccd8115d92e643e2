"""Supervised fine-tuning: TRL's SFTTrainer."""

from typing import Any

from trl import SFTConfig, SFTTrainer

from crrelu_llm.data.pairs import as_completions, holds_pairs
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.items import document_texts, evaluate_sft
from crrelu_llm.training.distillation import DistillationMixin
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind, Row
from crrelu_llm.training.saving import SavingMixin


class SFT(SavingMixin, DistillationMixin, EpsilonMixin, SFTTrainer):
    """TRL's SFTTrainer with a learnable ε."""


def _takes(columns: set[str], args: Any) -> bool:
    plain = {"messages", "conversations", "input_ids", args.dataset_text_field} & columns
    return bool(plain) or {"prompt", "completion"} <= columns or holds_pairs(columns)


def _parts(recipe: Any, row: Row) -> list[str]:
    if "prompt" in row:
        return ["prompt", "completion"]
    return ["messages"] if row.get("messages") is not None else [recipe.training.dataset_text_field]


def _prepare(split: Any, recipe: Any) -> Any:
    columns = set(split.column_names or ())
    if {"prompt", "messages"} <= columns - {"completion"}:  # UltraFeedback's, whose conversations repeat the prompt
        return split.remove_columns(["prompt"])
    if holds_pairs(columns) and not columns & {"messages", "completion", recipe.training.dataset_text_field}:
        return as_completions(split)
    return split


def _check(recipe: Any, where: str) -> None:
    args = recipe.training
    if args.eval_packing and not args.packing and args.packing_strategy != "wrapped":
        raise InputError(
            f"{where}eval_packing without packing: the evaluation documents of a row would see each other; set "
            "packing too, or leave it out"
        )


KIND = Kind(
    name="sft",
    label="supervised fine-tuning (SFT)",
    example="crrelu sft --config recipes/smollm2-135m/sft/config_full.yaml --max_steps 100",
    config=SFTConfig,
    trainer=SFT,
    items="documents",
    needs="a column messages or text, or prompt and completion",
    takes=_takes,
    parts=_parts,
    evaluate=evaluate_sft,
    texts=document_texts,
    prepare=_prepare,
    check=_check,
)
