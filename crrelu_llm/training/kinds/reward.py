"""Reward models, a head of one number on pairs of answers: TRL's RewardTrainer."""

from typing import Any

from trl import RewardConfig, RewardTrainer

from crrelu_llm.data.pairs import holds_pairs, in_pairs, parts_of_a_pair
from crrelu_llm.evaluation.rewarded import evaluate_reward, scored_texts
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind
from crrelu_llm.training.saving import SavingMixin


class Reward(SavingMixin, EpsilonMixin, RewardTrainer):
    """TRL's RewardTrainer with a learnable ε."""


def _takes(columns: set[str], args: Any) -> bool:
    return {"chosen_ids", "rejected_ids"} <= columns or holds_pairs(columns)


KIND = Kind(
    name="reward",
    label="reward modelling",
    example="crrelu reward --config recipes/smollm2-135m/reward/config_full.yaml --max_steps 100",
    config=RewardConfig,
    trainer=Reward,
    items="preference pairs",
    needs="the columns chosen and rejected (and prompt)",
    takes=_takes,
    parts=parts_of_a_pair,
    evaluate=evaluate_reward,
    texts=scored_texts,
    auto_class="AutoModelForSequenceClassification",
    sequences=2,
    prepare=lambda split, recipe: in_pairs(split),
)
