"""Simulations: intervals hold a known truth, and verdicts are false, as often as they say.

The default run takes the worlds that a wrong method fails; `pytest -m slow` takes more comparisons and more worlds.
Tolerances are binomial: a method that holds its level fails one of these tests once in some thousand runs of other
draws, and the draws are fixed.
"""

import numpy as np
import pytest
from scipy import stats
from worlds import World, decided

from crrelu_llm.evaluation.measured import linearised, shares_of
from crrelu_llm.statistics import paired

LEVEL = 0.05


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Simulations need many comparisons, not finely resolved ones."""
    monkeypatch.setattr(paired, "RESAMPLES", 399)


def most(trials, share):
    """As many of `trials` as an event of this probability exceeds once in a thousand times."""
    return stats.binom.isf(0.001, trials, share)


def check(world, trials, unit, level=LEVEL):
    """At most `level` of the intervals miss the truth, and of the verdicts are false where there is no difference."""
    rows = list(world.comparisons(trials, unit))
    assert sum(not row["covers"] for row in rows) <= most(trials, level)
    if world.truth == 0:
        assert sum(decided(row) for row in rows) <= most(trials, level)
    return rows


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.05, 0.5])
def test_runs_trained_anew_on_other_items(seeds, seed_sd):
    check(World(seeds, seed_sd=seed_sd), 150, "both")


def test_right_and_wrong_outcomes_over_seeds_and_items():
    check(World(3, seed_sd=0.4, shift=0.5, binary=True), 120, "both")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_runs_trained_anew_on_these_items(seeds):
    check(World(seeds, seed_sd=0.5), 250, "seed")


def test_items_and_agreeing_seeds_alone_would_call_luck_a_difference():
    """Why the verdict is over seeds and items: three seeds agree by luck once in four times."""
    rows = [(d, d.compare("item")) for d in World(3, 100, seed_sd=0.5).draws(80)]
    false = sum(decided(row) and d.agree for d, row in rows)
    assert false > most(80, LEVEL)


def test_the_detectable_difference_is_found_four_times_in_five():
    world = World(3, seed_sd=0.1)
    shift = paired.smallest_detectable(world.parts(), LEVEL)
    found = sum(map(decided, World(3, seed_sd=0.1, shift=shift).comparisons(200, "both")))
    assert stats.binomtest(found, 200, 0.8).pvalue > 0.001


def test_two_models_on_other_items():
    check(World(1, 100), 80, "item")
    check(World(1, 100, item_sd=0.3, binary=True), 80, "item")


def test_bits_per_byte_of_documents_of_unequal_length():
    """Without the shares of the documents the sign-flip test calls luck a difference several times too often."""
    rng, trials, false = np.random.default_rng(1), 200, {"shares": 0, "linearised": 0}
    for _ in range(trials):
        size = rng.lognormal(6, 1.5, 8)
        nll = size * rng.normal(3, 0.3, 8)
        other = nll + size * rng.normal(0, 0.01, 8)
        columns = [linearised(sums, size) for sums in (nll, other)]
        parts = (shares_of(nll, size), shares_of(other, size))
        for name, shares in (("shares", parts), ("linearised", None)):
            entry = paired.compare_metric(
                "bits", False, *columns, "item", baseline_name="a", candidate_name="b", shares=shares
            )
            assert entry.difference == pytest.approx(np.mean(parts[1]) - np.mean(parts[0]), abs=1e-9)
            false[name] += entry.p_value < LEVEL
    assert false["shares"] <= most(trials, LEVEL) < false["linearised"]


def test_a_difference_of_the_margin_is_rarely_called_equivalent():
    rows = list(World(3, shift=-0.3, seed_sd=0.1).comparisons(150, "both", margin=0.3))
    assert sum(row["equivalent"] for row in rows) <= sum(row["no_worse"] for row in rows) <= most(150, LEVEL / 2)
    near = list(World(3, seed_sd=0.01, item_sd=0.3).comparisons(60, "both", margin=0.3))
    assert sum(row["equivalent"] for row in near) > 54


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["both", "seed"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"seed_sd": 0.0},
        {"seed_sd": 0.1},
        {"seed_sd": 0.5},
        {"seed_sd": 0.1, "items": 3000},
        {"seed_sd": 0.1, "items": 20},
        {"seed_sd": 0.3, "binary": True},
        {"seed_sd": 0.1, "item_shape": "heavy"},
        {"seed_sd": 0.5, "seed_shape": "heavy"},
    ],
    ids=str,
)
def test_many_worlds(seeds, options, unit):
    check(World(seeds, **options), 1000, unit)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_skewed_luck_of_few_seeds_is_beyond_any_interval(seeds):
    """Student's interval misses more than it says, and a bootstrap of the seeds far more: the README gives numbers."""
    rows = list(World(seeds, seed_sd=0.5, seed_shape="skewed").comparisons(2000, "both"))
    missed = sum(not row["covers"] for row in rows)
    assert most(2000, LEVEL) < missed <= most(2000, 0.12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "missed"),
    [({}, 0.08), ({"item_sd": 0.3, "binary": True}, 0.08), ({"item_shape": "heavy"}, 0.11)],
    ids=str,
)
def test_many_items(options, missed):
    """A bootstrap of 200 items covers some points less than it says; verdicts also need the test, which holds."""
    rows = list(World(1, **options).comparisons(1000, "item"))
    assert sum(not row["covers"] for row in rows) <= most(1000, missed)
    assert sum(map(decided, rows)) <= most(1000, LEVEL)
