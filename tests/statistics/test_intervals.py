"""Intervals, p-values and power against scipy's own tests, formulas by hand, and simulated tests."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from crrelu_llm.statistics.intervals import (
    Part,
    accuracy_interval,
    attainable_level,
    fewest_disagreements,
    half_width,
    p_value,
    parts,
    smallest_detectable,
)


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_one_source_is_students_test(n):
    differences = np.random.default_rng(n).normal(0.4, 1, n)
    sources, mean = parts(differences), float(differences.mean())
    expected = stats.ttest_1samp(differences, 0)
    assert p_value(mean, sources) == pytest.approx(expected.pvalue, rel=1e-6)
    interval = expected.confidence_interval(0.9)
    assert (mean - half_width(sources, 0.9), mean + half_width(sources, 0.9)) == pytest.approx(tuple(interval))


def test_two_sources_add_the_half_widths_of_both_in_quadrature():
    table = np.random.default_rng(0).normal(size=(3, 50))
    seeds, items = (stats.ttest_1samp(table.mean(axis=axis), 0).confidence_interval() for axis in (1, 0))
    expected = math.hypot((seeds.high - seeds.low) / 2, (items.high - items.low) / 2)
    assert half_width(parts(table), 0.95) == pytest.approx(expected)


@pytest.mark.parametrize("difference", [0.01, -0.3, 1.0, 20.0])
def test_the_p_value_is_where_the_interval_reaches_zero(difference):
    sources = [Part(0.02, 2), Part(0.01, 300)]
    assert half_width(sources, 1 - p_value(difference, sources)) == pytest.approx(abs(difference), rel=1e-6)


def test_p_values_stay_between_nothing_and_one():
    assert p_value(0.0, [Part(1.0, 2)]) == 1.0
    assert 0 < p_value(1e9, [Part(1e-9, 200)]) <= 1e-12


@pytest.mark.parametrize("n", [3, 5, 200])
def test_the_detectable_difference_of_students_test_has_that_power(n):
    found = smallest_detectable([Part(1.0 / n, n - 1)], 0.05, power=0.8)
    limit, shift = stats.t.isf(0.025, n - 1), found * math.sqrt(n)
    power = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
    assert power == pytest.approx(0.8, abs=0.004)


def test_the_detectable_difference_of_two_seeds_has_that_power():
    found = smallest_detectable([Part(0.5, 1)], 0.05)
    limit = stats.t.isf(0.025, 1)

    def found_if(spread):  # two seeds estimate the standard deviation 1 as |z|, z normal
        return 2 * stats.norm.pdf(spread) * stats.norm.sf(limit * spread - found / math.sqrt(0.5))

    assert integrate.quad(found_if, 0, 8)[0] == pytest.approx(0.8, abs=0.01)


def test_more_seeds_and_more_items_detect_less():
    def detectable(seeds, items):
        return smallest_detectable([Part(0.04 / seeds, seeds - 1), Part(1.0 / items, items - 1)], 0.05)

    assert detectable(3, 100) > detectable(5, 100) > detectable(5, 1000) > detectable(50, 1000) > 0


@pytest.mark.parametrize("n", range(1, 12))
def test_the_attainable_level_by_counting(n):
    p_values = {2 * k / 2**n for k in range(1, 2 ** (n - 1) + 1)}
    assert attainable_level(n, 0.05) == max((p for p in p_values if p < 0.05), default=0)


def test_right_and_wrong_by_hand():
    differences = np.array([1.0] * 7 + [-1.0] * 2 + [0.0] * 41)
    won, lost = 8 / 52, 3 / 52
    (source,) = parts(differences, binary=True)
    assert source.variance == pytest.approx((won + lost - (won - lost) ** 2) / 52)
    assert parts(np.zeros(50), binary=True)[0].variance == pytest.approx(2 / 52 / 52)


def test_mcnemar_cannot_see_fewer_than_six_changed_items():
    share = fewest_disagreements(100, 0.05)
    assert stats.binom.sf(5, 100, share) == pytest.approx(0.8)
    assert stats.binomtest(6, 6).pvalue < 0.05 < stats.binomtest(5, 5).pvalue
    assert fewest_disagreements(5, 0.05) is None


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (130, 200), (200, 200)])
def test_wilson_by_its_formula(right, n):
    z, p = stats.norm.isf(0.025), right / n
    middle = (p + z**2 / 2 / n) / (1 + z**2 / n)
    width = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    values = np.array([1.0] * right + [0.0] * (n - right))
    assert accuracy_interval(values, 0.95) == pytest.approx([middle - width, middle + width], abs=1e-12)
