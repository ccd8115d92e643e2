"""The statistics against simulations with a known truth, counts by hand, and symmetries."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crrelu_llm.statistics import paired
from crrelu_llm.statistics.paired import Comparison, adjust, compare_metric, smallest_possible_p

FIELDS = {
    "metric", "higher_is_better", "baseline", "candidate", "baseline_mean", "candidate_mean", "difference", "ci_low",
    "ci_high", "confidence", "p_value", "p_adjusted", "unit", "n", "verdict", "test", "smallest_detectable",
    "equivalence_margin", "equivalent", "no_worse", "baseline_interval", "candidate_interval",
}  # fmt: skip


def compare(baseline, candidate, higher_is_better=True, unit="item", **options):
    """A comparison, as report.json has it."""
    found = compare_metric(
        "accuracy",
        higher_is_better,
        baseline,
        candidate,
        unit,
        baseline_name="gelu",
        candidate_name="crrelu",
        **options,
    )
    assert Comparison.of(found.as_dict()) == found
    return found.as_dict()


def adjusted(entries):
    """Entries after the correction for their number."""
    return [entry.as_dict() for entry in adjust([Comparison.of(entry) for entry in entries])]


@pytest.fixture
def few_resamples(monkeypatch):
    """Simulations need many comparisons, not finely resolved ones."""
    monkeypatch.setattr(paired, "RESAMPLES", 399)


def test_returns_the_fields_of_the_contract():
    result = compare([1.0, 2.0, 3.0], [2.0, 2.5, 5.0])
    assert set(result) == FIELDS
    assert (result["baseline"], result["candidate"], result["n"], result["unit"]) == ("gelu", "crrelu", 3, "item")
    assert result["baseline_mean"] == pytest.approx(2.0)
    assert result["candidate_mean"] == pytest.approx(19 / 6)
    assert result["difference"] == pytest.approx(7 / 6)
    assert result["p_adjusted"] == result["p_value"]


def test_interval_covers_a_known_truth_about_as_often_as_it_says(few_resamples):
    rng = np.random.default_rng(1)
    truth, trials, covered = 0.3, 300, 0
    for trial in range(trials):
        shared = rng.normal(size=40)  # pairs share an item's difficulty, which the pairing must cancel
        result = compare(shared, shared + truth + rng.exponential(0.5, 40) - 0.5, seed=trial)
        covered += result["ci_low"] <= truth <= result["ci_high"]
    assert 0.90 <= covered / trials <= 0.985


def test_false_positives_stay_at_the_level(few_resamples):
    rng = np.random.default_rng(2)
    trials = 400
    positives = sum(
        compare(shared + rng.normal(size=25), shared + rng.normal(size=25), seed=trial)["p_value"] < 0.05
        for trial, shared in enumerate(rng.normal(size=(trials, 25)))
    )
    assert 0.02 <= positives / trials <= 0.085


def test_a_real_difference_is_found_and_named_by_the_direction_of_the_metric():
    rng = np.random.default_rng(3)
    baseline = rng.normal(5, 1, 100)
    candidate = baseline + rng.normal(0.5, 0.5, 100)
    assert compare(baseline, candidate, higher_is_better=True)["verdict"] == "better"
    assert compare(baseline, candidate, higher_is_better=False)["verdict"] == "worse"


@pytest.mark.parametrize("n", range(2, 8))
def test_exact_permutation_of_all_positive_differences(n):
    result = compare(np.zeros(n), np.arange(1.0, n + 1), unit="seed")
    assert result["test"] == "permutation"
    assert result["p_value"] == pytest.approx(smallest_possible_p(n))


def test_three_seeds_reach_no_more_than_a_quarter_and_stay_undecided():
    result = compare([90.0, 91.0, 90.5], [80.0, 81.2, 80.4], higher_is_better=False, unit="seed")
    assert result["p_value"] == pytest.approx(0.25) == smallest_possible_p(3)
    assert result["ci_high"] < 0
    assert result["verdict"] == "undecided"


def test_permutation_by_enumeration_of_the_signs():
    differences = np.array([0.7, -0.2, 1.3, 0.4, -0.9])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    means = signs @ differences / 5
    tails = [np.mean(means >= differences.mean() - 1e-12), np.mean(means <= differences.mean() + 1e-12)]
    assert compare(np.zeros(5), differences)["p_value"] == pytest.approx(min(1, 2 * min(tails)))


def test_mcnemar_by_hand():
    # 9 items only the candidate gets right, 2 only the baseline: p = 2 · P(Binomial(11, 1/2) <= 2)
    baseline = [0] * 9 + [1] * 2 + [1] * 20 + [0] * 5
    candidate = [1] * 9 + [0] * 2 + [1] * 20 + [0] * 5
    result = compare(baseline, candidate, binary=True)
    assert result["test"] == "mcnemar"
    assert result["p_value"] == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)


def test_binary_values_averaged_over_seeds_take_the_permutation_test():
    assert compare([0, 1, 0.5], [1, 1, 1], binary=True)["test"] == "permutation"
    assert compare([0, 1, 0], [1, 1, 1], binary=False)["test"] == "permutation"


@pytest.mark.parametrize(("baseline", "candidate"), [([], []), ([1.0], [2.0])])
def test_fewer_than_two_pairs_decide_nothing(baseline, candidate):
    result = compare(baseline, candidate)
    assert (result["ci_low"], result["ci_high"], result["p_value"], result["p_adjusted"]) == (None,) * 4
    assert (result["test"], result["verdict"]) == ("none", "undecided")
    assert "note" in result


@pytest.mark.parametrize("binary", [True, False])
def test_no_difference_at_all_is_p_1_without_warnings(binary):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare([1, 0, 1, 1], [1, 0, 1, 1], binary=binary)
    assert (result["p_value"], result["ci_low"], result["ci_high"], result["difference"]) == (1.0, 0.0, 0.0, 0.0)
    assert result["verdict"] == "undecided"


def test_a_constant_difference_has_a_point_interval_without_warnings():
    baseline = np.linspace(0, 1, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare(baseline, baseline + 0.1)
    assert result["ci_low"] == result["ci_high"] == pytest.approx(0.1)
    assert result["verdict"] == "better"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_decide_nothing_and_say_so(bad):
    result = compare([1.0, 2.0, 3.0], [2.0, bad, 4.0])
    assert result["note"] == "1 of 3 pairs hold a value that is not a finite number"
    assert (result["verdict"], result["p_value"], result["candidate_mean"]) == ("undecided", None, None)
    assert result["baseline_mean"] == 2.0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="confidence"):
        compare([1.0, 2.0], [1.0, 2.0], confidence=95)


def test_confidence_sets_the_width_and_the_level():
    rng = np.random.default_rng(4)
    baseline, candidate = rng.normal(size=30), rng.normal(0.4, 1, 30)
    narrow, wide = (compare(baseline, candidate, confidence=c) for c in (0.8, 0.99))
    assert wide["ci_low"] < narrow["ci_low"] < narrow["ci_high"] < wide["ci_high"]


def test_adjust_is_benjamini_hochberg_within_each_unit():
    def entry(p, unit):
        return compare([0, 0], [1, 1], unit=unit) | {"p_value": p, "ci_low": 0.5, "ci_high": 1.5, "difference": 1.0}

    given_ = [entry(0.01, "item"), entry(0.04, "item"), entry(None, "item"), entry(0.04, "seed"), entry(0.03, "item")]
    result = adjusted(given_)
    assert [c["p_adjusted"] for c in result] == [
        pytest.approx(p) if p else None for p in (0.03, 0.04, None, 0.04, 0.04)
    ]
    assert [c["verdict"] for c in result] == ["better", "better", "undecided", "better", "better"]


def test_rows_that_a_verdict_counts_are_a_family_of_their_own():
    entries = [compare([0, 0], [1, 1]) | {"p_value": p} for p in (0.04, 0.001, 0.001, 0.001)]
    together = [entry["p_adjusted"] for entry in adjusted(entries)]
    entries[0] |= {"primary": True}
    entries[1] |= {"primary": True}
    apart = [entry["p_adjusted"] for entry in adjusted(entries)]
    assert together == pytest.approx([0.04, 0.001333, 0.001333, 0.001333], abs=1e-6)
    assert apart == pytest.approx([0.04, 0.002, 0.001, 0.001])


def test_adjust_takes_back_a_verdict_that_many_comparisons_make_cheap():
    single = compare(np.zeros(10), [1, 2, 3, 4, 5, 6, 7, 8, -6, -7])
    single |= {"p_value": 0.04, "p_adjusted": 0.04, "ci_low": 0.1, "ci_high": 5.0}
    nothing = compare([1, 2, 3], [1, 2, 3])
    assert adjusted([single])[0]["verdict"] == "better"
    assert adjusted([single, nothing, nothing, nothing])[0]["verdict"] == "undecided"
    assert adjusted([]) == []


def test_many_pairs_take_the_large_sample_forms_which_agree_with_resampling(monkeypatch):
    rng = np.random.default_rng(5)
    baseline, candidate = rng.normal(size=500), rng.normal(0.12, 1, 500)
    resampled = compare(baseline, candidate)
    monkeypatch.setattr(paired, "_MANY", 100)
    limit = compare(baseline, candidate)
    assert limit["p_value"] == pytest.approx(resampled["p_value"], abs=0.01)
    assert limit["ci_low"] == pytest.approx(resampled["ci_low"], abs=0.01)


# Eighths are exact in binary, so that a shift moves no difference by a rounding error.
eighths = st.integers(-80, 80).map(lambda k: k / 8)
pairs = st.lists(st.tuples(eighths, eighths), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_swapping_the_arms_swaps_everything(values):
    baseline, candidate = (list(column) for column in zip(*values, strict=True))
    there, back = compare(baseline, candidate), compare(candidate, baseline)
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-12)
    assert there["ci_low"] == pytest.approx(-back["ci_high"], abs=1e-9)
    assert there["p_value"] == pytest.approx(back["p_value"])
    assert back["verdict"] == {"better": "worse", "worse": "better"}.get(there["verdict"], "undecided")


@settings(max_examples=40, deadline=None)
@given(pairs, st.integers(-100, 100))
def test_a_common_shift_changes_nothing(values, shift):
    baseline, candidate = (np.array(column) for column in zip(*values, strict=True))
    plain, shifted = compare(baseline, candidate), compare(baseline + shift, candidate + shift)
    for field in ("difference", "ci_low", "ci_high", "p_value"):
        assert plain[field] == pytest.approx(shifted[field])
    assert plain["verdict"] == shifted["verdict"]


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_interval_holds_the_difference_within_the_range_of_the_pairs(values):
    baseline, candidate = (np.array(column) for column in zip(*values, strict=True))
    result = compare(baseline, candidate)
    differences = candidate - baseline
    assert differences.min() - 1e-9 <= result["ci_low"] <= result["ci_high"] <= differences.max() + 1e-9
    assert 0 < result["p_value"] <= 1


def test_over_seeds_and_items_the_interval_is_at_least_as_wide_as_over_either():
    rng = np.random.default_rng(6)
    baseline = rng.normal(size=(3, 40))
    candidate = baseline + rng.normal(0.5, 0.1, (3, 1)) + rng.normal(0, 0.3, (1, 40))
    both = compare(baseline, candidate, unit="both")
    seeds, items = (
        compare(baseline.mean(axis=a), candidate.mean(axis=a), unit=u) for a, u in ((1, "seed"), (0, "item"))
    )
    for row in (seeds, items):
        assert both["difference"] == pytest.approx(row["difference"])
        assert both["ci_low"] < row["ci_low"] < row["ci_high"] < both["ci_high"]
    assert (both["n"], both["n_seeds"], both["test"]) == (40, 3, "t")
    assert (both["p_value"] < 0.05) == (both["ci_low"] > 0 or both["ci_high"] < 0)


@pytest.mark.parametrize(
    ("baseline", "candidate", "note"),
    [
        (np.zeros((1, 5)), np.ones((1, 5)), "two seeds or more; there is 1"),
        (np.zeros((3, 1)), np.ones((3, 1)), "two items or more; there is 1"),
        (np.zeros((3, 4)), np.tile([1.0, 2, 3, 4], (3, 1)), "all 3 seeds gave exactly the same differences"),
    ],
)
def test_what_seeds_and_items_cannot_decide_is_said(baseline, candidate, note):
    result = compare(baseline, candidate, unit="both")
    assert note in result["note"]
    assert (result["verdict"], result["p_value"], result["ci_low"]) == ("undecided", None, None)


def test_arms_that_are_the_same_model_are_undecided_not_an_error():
    result = compare(np.ones((3, 4)), np.ones((3, 4)), unit="both", margin=0.1)
    assert (result["difference"], result["p_value"], result["verdict"]) == (0.0, 1.0, "undecided")
    assert (result["smallest_detectable"], result["equivalent"]) == (None, None), "nothing varied, nothing is known"


def test_five_seeds_can_show_nothing_by_a_permutation_test_and_six_can():
    few, enough = (compare(np.zeros(n), np.arange(1.0, n + 1), unit="seed") for n in (5, 6))
    assert few["smallest_detectable"] is None
    assert few["verdict"] == "undecided"
    assert enough["smallest_detectable"] > 0
    assert enough["verdict"] == "better"


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize(
    ("mean", "equivalent", "no_worse"), [(0.0, True, True), (0.5, False, True), (-0.5, False, False)]
)
def test_equivalence_and_no_worse(mean, equivalent, no_worse, higher_is_better):
    noise = np.random.default_rng(7).normal(0, 0.1, 100)
    sign = 1 if higher_is_better else -1
    result = compare(np.zeros(100), sign * (mean + noise), higher_is_better, margin=0.3)
    assert (result["equivalent"], result["no_worse"], result["equivalence_margin"]) == (equivalent, no_worse, 0.3)


def test_a_few_items_that_all_agree_are_not_called_equivalent():
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0] * 4)
    assert compare(right, right, binary=True, margin=0.02)["equivalent"] is False
    assert compare(np.tile(right, 1000), np.tile(right, 1000), binary=True, margin=0.02)["equivalent"] is True


def test_accuracies_have_wilsons_intervals():
    result = compare([1] * 7 + [0] * 3, [1] * 9 + [0], binary=True)
    assert result["baseline_interval"] == pytest.approx([0.3968, 0.8922], abs=1e-4)
    assert result["candidate_interval"] == pytest.approx([0.5958, 0.9821], abs=1e-4)


@pytest.mark.parametrize("margin", [0, -1, math.nan, math.inf])
def test_a_margin_must_be_positive(margin):
    with pytest.raises(ValueError, match="margin"):
        compare([1.0, 2.0], [1.0, 2.0], margin=margin)


def test_tables_need_the_unit_both():
    with pytest.raises(ValueError, match="two equal lists"):
        compare(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="tables"):
        compare([1.0, 2.0], [1.0, 2.0], unit="both")
