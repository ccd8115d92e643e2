"""Kahneman-Tversky optimisation, on desirable and undesirable answers: TRL's KTOTrainer."""

from typing import Any

from trl import KTOConfig, KTOTrainer

from crrelu_llm.data.pairs import holds_pairs, in_pairs, parts_of_a_pair
from crrelu_llm.evaluation.unpaired import answer_texts, evaluate_kto
from crrelu_llm.training.blending import BlendedReferenceMixin
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind, Row, refuse_moving_references
from crrelu_llm.training.saving import SavingMixin


class KTO(SavingMixin, BlendedReferenceMixin, EpsilonMixin, KTOTrainer):
    """TRL's KTOTrainer with a learnable ε."""


def _takes(columns: set[str], args: Any) -> bool:
    return {"prompt", "completion", "label"} <= columns or holds_pairs(columns)


def _parts(recipe: Any, row: Row) -> list[str]:
    return ["prompt", "completion"] if "completion" in row else parts_of_a_pair(recipe, row)


KIND = Kind(
    name="kto",
    label="Kahneman-Tversky optimisation (KTO)",
    example="crrelu kto --config recipes/smollm2-135m/kto/config_full.yaml --beta 0.1",
    config=KTOConfig,
    trainer=KTO,
    items="answers",
    needs="the columns prompt, completion and label, or chosen and rejected (and prompt)",
    takes=_takes,
    parts=_parts,
    evaluate=evaluate_kto,
    texts=answer_texts,
    reference=True,
    prepare=lambda split, recipe: in_pairs(split),
    check=refuse_moving_references,
)
