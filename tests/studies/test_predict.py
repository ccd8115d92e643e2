"""Entropy against loss: correlations with known answers, and what is refused of a comparison."""

import itertools

import numpy as np
import pytest
from comparisons import ARMS, write_comparison
from scipy import stats

from crrelu_llm.errors import InputError
from crrelu_llm.studies import predict


def test_losses_of_a_comparison(tmp_path):
    directory = write_comparison(tmp_path / "c", (*ARMS, "native", "relu2"), losses={"relu2": None})
    found = predict.read_losses(directory)
    assert [arm["activation"] for arm in found["arms"]] == list(ARMS)
    assert found["arms"][1]["losses"] == [3.0, 3.1]
    assert (found["calibration"], found["seeds"]) == ("none", [0, 1])
    assert found["left_out"] == [
        {"arm": "native", "reason": "not swapped"},
        {"arm": "relu2", "reason": "runs that are not finished"},
    ]


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        (("relu", "gelu", "native"), {}, "2 arms with finished runs of a swapped activation"),
        ((*ARMS, "crrelu:calibration=refit"), {}, r"calibrated differently \(relu none, .*calibration=refit refit\)"),
        (ARMS, {"points": ({"beta": "1"}, {"beta": "2"})}, "a comparison over a grid"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(arms, more, words, tmp_path):
    directory = write_comparison(tmp_path / "c", arms, **more)
    with pytest.raises(InputError, match=words) as error:
        predict.read_losses(directory)
    assert str(error.value).startswith(str(directory))


def test_a_directory_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no comparison"):
        predict.read_losses(tmp_path)


def test_a_perfect_order():
    values = np.arange(7.0)
    losses = values[:, None] ** 2 + np.array([0.0, 0.1, 0.05])
    found = predict.correlate(values, losses)
    assert found["spearman"]["value"] == pytest.approx(1)
    assert found["kendall"]["value"] == pytest.approx(1)
    # Of the 7! orders this one and its mirror image are as extreme.
    assert found["spearman"]["p_value"] == pytest.approx(2 / 5040)
    assert found["kendall"]["p_value"] == pytest.approx(2 / 5040)
    assert found["spearman"]["low"] == pytest.approx(1)


def test_no_order_gives_a_wide_interval():
    random = np.random.default_rng(3)
    values, losses = random.normal(size=9), random.normal(size=(9, 4))
    found = predict.correlate(values, losses)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(values, losses.mean(axis=1)).statistic)
    for entry in found.values():
        assert entry["low"] < entry["value"] < entry["high"]
        assert entry["low"] < 0 < entry["high"]


def test_the_p_values_are_those_of_all_orders():
    random = np.random.default_rng(1)
    values, losses = random.normal(size=5), random.normal(size=(5, 2))
    found, mean = predict.correlate(values, losses), losses.mean(axis=1)
    for name, function in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        orders = [function(values[list(order)], mean).statistic for order in itertools.permutations(range(5))]
        share = np.mean(np.abs(orders) >= abs(found[name]["value"]) - 1e-9)
        assert found[name]["p_value"] == pytest.approx(share, abs=0.02), name


def test_tau_of_rows_is_scipys():
    random = np.random.default_rng(0)
    x, y = random.integers(4, size=(5, 8)).astype(float), random.normal(size=(5, 8))
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert predict._tau(x, y) == pytest.approx(expected)


def test_arms_without_a_finite_number_are_left_out_of_that_predictor(tmp_path):
    comparison = predict.read_losses(write_comparison(tmp_path / "c"))
    means = [
        {
            "activation": arm,
            "at_resolution": float(i),
            "standardised": i or -np.inf,
            "entropy": -np.inf,
            "distance": 1.0,
        }
        for i, arm in enumerate(ARMS)
    ]
    found = {entry["predictor"]: entry for entry in predict.predict(means, comparison)["predictors"]}
    assert [found[key]["n"] for key in predict.PREDICTORS] == [5, 4, 0, 5]
    assert found["at_resolution"]["spearman"]["value"] == pytest.approx(1)
    assert found["entropy"]["spearman"] is None
    assert found["distance"]["spearman"] is None  # the same for all arms: no order
