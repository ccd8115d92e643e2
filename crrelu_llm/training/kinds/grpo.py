"""Group relative policy optimisation, on rewards of sampled answers: TRL's GRPOTrainer."""

from trl import GRPOConfig, GRPOTrainer
from trl.scripts.grpo import GRPOScriptArguments

from crrelu_llm.data.pairs import as_prompts
from crrelu_llm.evaluation.generated import evaluate_generated, prompt_texts
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind
from crrelu_llm.training.rewards import SampledMixin, has_prompts, parts_of_a_prompt, refuse_blend, reward_arguments
from crrelu_llm.training.saving import SavingMixin


class GRPO(SavingMixin, SampledMixin, EpsilonMixin, GRPOTrainer):
    """TRL's GRPOTrainer with a learnable ε."""


KIND = Kind(
    name="grpo",
    label="group relative policy optimisation (GRPO)",
    example="crrelu grpo --config recipes/smollm2-135m/grpo/config_full.yaml --reward_funcs rewards.py:brevity",
    config=GRPOConfig,
    trainer=GRPO,
    items="prompts",
    needs="a column prompt (or messages, or chosen and rejected, from which the prompt is taken)",
    takes=has_prompts,
    parts=parts_of_a_prompt,
    evaluate=evaluate_generated,
    texts=prompt_texts,
    headline="reward",
    logged=("eval_reward", True),
    script=GRPOScriptArguments,
    samples=True,
    prepare=lambda split, recipe: as_prompts(split),
    check=refuse_blend,
    arguments=reward_arguments,
)
