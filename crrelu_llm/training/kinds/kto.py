"""Kahneman-Tversky optimisation, on desirable and undesirable answers: TRL's KTOTrainer."""

import logging
from typing import Any

from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

from crrelu_llm.data.pairs import holds_pairs, in_pairs, parts_of_a_pair, with_prompts
from crrelu_llm.evaluation.unpaired import answer_texts, evaluate_kto
from crrelu_llm.training.blending import BlendedReferenceMixin
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind, Row, refuse_moving_references
from crrelu_llm.training.saving import SavingMixin

logger = logging.getLogger("crrelu_llm")


class KTO(SavingMixin, BlendedReferenceMixin, EpsilonMixin, KTOTrainer):
    """TRL's KTOTrainer with a learnable ε."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        steps, size = self.args.max_steps, self.args.per_device_train_batch_size
        rows = steps * size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if steps > 0 and hasattr(self.train_dataset, "__len__") and len(set(self.train_dataset[:rows]["label"])) < 2:
            logger.warning(
                "the %d answers within max_steps are all desirable or all undesirable: KTO takes rows in order, and "
                "from preference pairs all chosen answers first; shuffle the data, or train longer",
                rows,
            )


def _drawn(train: Any, seed: int) -> Any:
    """The answers in the order of a seed, with pairs split into single answers; TRL does not shuffle them."""
    if not hasattr(train, "__len__"):
        return train
    if holds_pairs(set(train.column_names)):
        train = unpair_preference_dataset(with_prompts(train))
    return train.shuffle(seed=seed)


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
    items="prompts",
    needs="the columns prompt, completion and label, or chosen and rejected (and prompt)",
    takes=_takes,
    parts=_parts,
    evaluate=evaluate_kto,
    texts=answer_texts,
    reference=True,
    prepare=lambda split, recipe: in_pairs(split),
    drawn=_drawn,
    check=refuse_moving_references,
)
