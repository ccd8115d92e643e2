"""The metrics against numbers worked out by hand."""

import math

import pytest

from crrelu_llm.evaluation.metrics import METRICS, LanguageModelling, PairwisePreference


def test_language_modelling():
    computed = LanguageModelling(keep_in_memory=True).compute(
        negative_log_likelihood=[2.0, 7.0], tokens=[1, 5], correct=[1, 2]
    )
    assert computed == pytest.approx({"loss": 1.5, "perplexity": math.exp(1.5), "token_accuracy": 0.5})


def test_a_destroyed_model_has_a_finite_perplexity():
    computed = LanguageModelling(keep_in_memory=True).compute(negative_log_likelihood=[1e6], tokens=[1], correct=[0])
    assert computed["loss"] == 1e6
    assert math.isfinite(computed["perplexity"])


def test_pairwise_preference():
    computed = PairwisePreference(keep_in_memory=True).compute(
        chosen_reward=[1.0, 0.0, -1.0, 2.0],
        rejected_reward=[0.5, 0.0, 1.0, -2.0],  # margins 0.5, 0 (a tie counts one half), -2 and 4
        chosen_tokens=[3, 5, 2, 4],
        rejected_tokens=[3, 4, 6, 4],  # a tie counts one half
    )
    wanted = {
        "reward_accuracy": (1 + 0.5 + 0 + 1) / 4,
        "reward_margin": 0.625,
        "longer_answer_accuracy": (0.5 + 1 + 0 + 0.5) / 4,
        # Ranks of the margins 3, 2, 1, 4; of the differences in length (0, 1, -4, 0) 2.5, 4, 1, 2.5.
        "length_correlation": 1.5 / math.sqrt(5 * 4.5),
    }
    assert computed == pytest.approx(wanted)


@pytest.mark.parametrize("margins", [[1.0, 1.0, 1.0], [1e-6, 2e-6, 0.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_margins_without_an_order_do_not_correlate_with_lengths(margins):
    computed = PairwisePreference(keep_in_memory=True).compute(
        chosen_reward=margins, rejected_reward=[0.0] * 3, chosen_tokens=[3, 5, 2], rejected_tokens=[1, 1, 1]
    )
    assert computed["length_correlation"] == 0.0


def test_every_metric_is_described():
    for label, higher_is_better, template, control in METRICS.values():
        assert label
        assert template.format(0.5).startswith("0.5")
        assert (type(higher_is_better), type(control)) == (bool, bool)
    assert not METRICS["loss"][1]
    assert not METRICS["perplexity"][1]
    assert METRICS["reward_accuracy"][1]
