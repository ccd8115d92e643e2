"""The metrics of a comparison, as `evaluate.Metric` classes: language modelling and pairwise preference."""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

from crrelu_llm.evaluation.measured import exponential, wins

# name -> (label, whether higher is better, format, whether it is a control without a verdict)
METRICS: dict[str, tuple[str, bool, str, bool]] = {
    "loss": ("loss", False, "{:.4f}", False),
    "loss_after_beginning": ("loss after the common beginning of all documents", False, "{:.4f}", True),
    "perplexity": ("perplexity", False, "{:.2f}", False),
    "accuracy": ("top-1 accuracy", True, "{:.4f}", False),
    "top5_accuracy": ("top-5 accuracy", True, "{:.4f}", False),
    "token_accuracy": ("token accuracy", True, "{:.4f}", False),
    "reward_accuracy": ("reward accuracy", True, "{:.3f}", False),
    "reward_margin": ("reward margin", True, "{:.4f}", False),
    "answer_accuracy": ("accuracy of desirable against undesirable", True, "{:.3f}", False),
    "reward": ("reward", True, "{:.4f}", False),
    "kl": ("divergence from the reference", False, "{:.4f}", True),
    "answer_tokens": ("tokens of an answer", False, "{:.1f}", True),
    "longer_answer_accuracy": ("accuracy of “the longer answer wins”", True, "{:.3f}", True),
    "length_correlation": ("rank correlation of margins with lengths", True, "{:.2f}", True),
}
_ROUNDING = 1e-4  # the margins of a policy that is its own reference spread less than this


class LanguageModelling(evaluate.Metric):
    """Loss, perplexity and token accuracy of documents, weighted by their number of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"negative_log_likelihood": "float64", "tokens": "int64", "correct": "int64"}
        return _info(
            "Mean negative log-likelihood per token (nats), its exponential, and the share of tokens that are the "
            "model's first choice.",
            features,
        )

    def _compute(self, negative_log_likelihood: Any, tokens: Any, correct: Any) -> dict[str, float]:
        count = max(int(np.sum(tokens)), 1)
        loss = float(np.sum(negative_log_likelihood)) / count
        return {
            "loss": loss,
            "perplexity": exponential(loss),
            "token_accuracy": float(np.sum(correct)) / count,
        }


class PairwisePreference(evaluate.Metric):
    """Reward accuracy and margin of preference pairs, and two controls for the length of the answers.

    The controls: the accuracy of preferring the longer answer, and the rank correlation (Spearman) of the margins with
    the differences in length, 0 where either does not vary. Near 1, a model prefers the longer answer, whatever it
    says.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "chosen_reward": "float64",
            "rejected_reward": "float64",
            "chosen_tokens": "int64",
            "rejected_tokens": "int64",
        }
        return _info("Share of pairs whose chosen answer has the higher reward, and the mean difference.", features)

    def _compute(
        self, chosen_reward: Any, rejected_reward: Any, chosen_tokens: Any, rejected_tokens: Any
    ) -> dict[str, float]:
        margin = np.asarray(chosen_reward) - np.asarray(rejected_reward)
        longer = np.asarray(chosen_tokens) - np.asarray(rejected_tokens)
        return {
            "reward_accuracy": float(np.mean(wins(margin))),
            "reward_margin": float(np.mean(margin)),
            "longer_answer_accuracy": float(np.mean(wins(longer))),
            "length_correlation": _rank_correlation(margin, longer),
        }


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """The rank correlation of margins and differences in length; 0 if nothing but rounding orders them."""
    if not np.isfinite(first).all() or np.ptp(first) < _ROUNDING or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _info(description: str, features: dict[str, str]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="One number per item, in the order of the evaluation data.",
        features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
    )
