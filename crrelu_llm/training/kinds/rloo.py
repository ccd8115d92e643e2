"""REINFORCE leave-one-out, on rewards of sampled answers: TRL's RLOOTrainer."""

from dataclasses import replace

from trl import RLOOConfig, RLOOTrainer
from trl.scripts.rloo import RLOOScriptArguments

from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds import grpo
from crrelu_llm.training.rewards import SampledMixin
from crrelu_llm.training.saving import SavingMixin


class RLOO(SavingMixin, SampledMixin, EpsilonMixin, RLOOTrainer):
    """TRL's RLOOTrainer with a learnable ε."""


KIND = replace(
    grpo.KIND,
    name="rloo",
    label="REINFORCE leave-one-out (RLOO)",
    example="crrelu rloo --config recipes/smollm2-135m/grpo/config_full.yaml --reward_funcs rewards.py:brevity",
    config=RLOOConfig,
    trainer=RLOO,
    script=RLOOScriptArguments,
    reference=True,
)
