"""Direct preference optimisation: TRL's DPOTrainer."""

from typing import Any

from trl import DPOConfig, DPOTrainer

from crrelu_llm.data.pairs import holds_pairs, in_pairs, parts_of_a_pair
from crrelu_llm.evaluation.items import evaluate_dpo, pair_texts
from crrelu_llm.training.blending import BlendedReferenceMixin
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind, refuse_moving_references
from crrelu_llm.training.saving import SavingMixin


class DPO(SavingMixin, BlendedReferenceMixin, EpsilonMixin, DPOTrainer):
    """TRL's DPOTrainer with a learnable ε."""


def _takes(columns: set[str], args: Any) -> bool:
    return holds_pairs(columns)


KIND = Kind(
    name="dpo",
    label="direct preference optimisation (DPO)",
    example="crrelu dpo --config recipes/smollm2-135m/dpo/config_lora.yaml --beta 0.5",
    config=DPOConfig,
    trainer=DPO,
    items="preference pairs",
    needs="the columns chosen and rejected (and prompt)",
    takes=_takes,
    parts=parts_of_a_pair,
    evaluate=evaluate_dpo,
    texts=pair_texts,
    reference=True,
    sequences=2,
    prepare=lambda split, recipe: in_pairs(split),
    check=refuse_moving_references,
)
