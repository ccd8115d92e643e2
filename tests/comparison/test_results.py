"""From runs to comparisons: which rows there are, over which pairs, and what spoils them."""

import math

import numpy as np
import pytest

from crrelu_llm.cli.main import main
from crrelu_llm.comparison.results import Outcome, _environment, _share_weights, compare_runs
from crrelu_llm.comparison.settings import Settings
from crrelu_llm.report.schema import Metric, Run

METRICS = {
    "loss": Metric(label="loss"),
    "reward_accuracy": Metric(label="reward accuracy", higher_is_better=True),
    "longer_answer_accuracy": Metric(label="longer", higher_is_better=True, reference=True),
}


def comparison(seeds=3, items=12, arms=("gelu", "crrelu")):
    """Settings and finished runs: losses by item, and right/wrong outcomes."""
    rng = np.random.default_rng(0)
    settings = Settings(
        identity={},
        kind="sft",
        commands=[],
        created="",
        baseline="gelu",
        arms=list(arms),
        seeds=list(range(seeds)),
        asked=[],
        points=[{}],
        recipe={},
        data=[],
    )
    runs = {}
    for arm in arms:
        for seed in range(seeds):
            losses = rng.normal(3 + 0.2 * (arm != "gelu"), 0.1, items)
            right = (rng.random(items) < 0.6).astype(float)
            metrics = {"loss": losses.mean(), "reward_accuracy": right.mean(), "longer_answer_accuracy": 0.6}
            values = {"loss": losses.tolist(), "reward_accuracy": right.tolist()}
            runs[arm, "", seed] = Outcome(Run(seed=seed, status="done", metrics=metrics), values)
    return settings, runs


def rows(settings, runs, **margins):
    return {(row.metric, row.unit): row for row in compare_runs(settings, runs, METRICS, margins)}


def test_each_metric_is_compared_over_seeds_over_items_and_over_both():
    settings, runs = comparison()
    found = rows(settings, runs)
    assert set(found) == {(m, unit) for m in ("loss", "reward_accuracy") for unit in ("seed", "item", "both")}
    both = found["loss", "both"]
    tables = [np.array([runs[arm, "", s].items["loss"] for s in range(3)]) for arm in ("gelu", "crrelu")]
    assert both.difference == pytest.approx((tables[1] - tables[0]).mean()) == found["loss", "item"].difference
    assert (both.n, both.n_seeds, both.test) == (12, 3, "t")
    assert both.verdict == "worse"


def test_a_document_counts_by_its_tokens():
    """Differences over items are those of the losses per token, which the report shows beside them."""
    settings, runs = comparison()
    tokens = np.array([5, 80] * 6)
    for outcome in runs.values():
        outcome.items["loss"] = (
            np.array(outcome.items["loss"]) + 0.9 * (tokens > 50) * (outcome.run.seed > 0)
        ).tolist()
        outcome.items["tokens"] = tokens.tolist()
        outcome.run.metrics["loss"] = float(np.average(outcome.items["loss"], weights=tokens))
    found = rows(settings, runs)
    assert {metric for metric, _ in found} == {"loss", "reward_accuracy"}
    for unit in ("item", "both"):
        assert found["loss", unit].difference == pytest.approx(found["loss", "seed"].difference)
        assert found["loss", unit].baseline_mean == pytest.approx(found["loss", "seed"].baseline_mean)


def test_runs_from_before_weights_were_saved_get_those_of_the_others():
    _, runs = comparison()
    runs["gelu", "", 0].items["tokens"] = list(range(12))
    runs["crrelu", "", 2].items["loss"].pop()
    _share_weights(runs)
    assert runs["crrelu", "", 1].items["tokens"] == list(range(12))
    assert "tokens" not in runs["crrelu", "", 2].items


def test_machines_that_differ_are_all_named():
    first = {"device": "cpu", "processes": 1, "versions": {"torch": "2.13.0", "trl": "1"}}
    second = first | {"device": "H200", "versions": {"torch": "2.11.0", "trl": "1"}}
    assert _environment([first, first]) == first and _environment([]) == {}
    merged = {"device": "cpu or H200", "processes": 1, "versions": {"torch": "2.13.0 or 2.11.0", "trl": "1"}}
    assert _environment([first, second, first]) == merged


def test_one_seed_has_no_row_over_both():
    assert {unit for _, unit in rows(*comparison(seeds=1))} == {"seed", "item"}


@pytest.mark.parametrize("bad", [math.nan, None])
def test_an_item_that_is_not_a_number_is_named(bad):
    settings, runs = comparison()
    runs["crrelu", "", 1].items["loss"][4] = bad
    found = rows(settings, runs)
    assert found["loss", "both"].note == "1 of 36 pairs hold a value that is not a finite number"
    assert found["loss", "item"].note == "1 of 12 pairs hold a value that is not a finite number"
    assert found["loss", "both"].verdict == "undecided"
    assert found["reward_accuracy", "both"].p_value is not None


def test_runs_on_other_numbers_of_items_are_compared_by_seed_alone():
    settings, runs = comparison()
    runs["crrelu", "", 2].items["loss"].pop()
    assert {unit for metric, unit in rows(settings, runs) if metric == "loss"} == {"seed"}


def test_without_the_baseline_nothing_is_compared():
    settings, runs = comparison()
    for seed in range(3):
        runs["gelu", "", seed].run = Run(seed=seed, status="failed", metrics={})
    assert rows(settings, runs) == {}


def test_margins_are_the_users_or_the_usual_ones():
    settings, runs = comparison()
    found = rows(settings, runs, loss=0.5)
    assert (found["loss", "both"].equivalence_margin, found["loss", "both"].equivalent) == (0.5, True)
    assert found["reward_accuracy", "both"].equivalence_margin == 0.01
    assert rows(settings, runs)["loss", "both"].no_worse is False


@pytest.mark.parametrize("argument", ["loss", "loss=", "=1", "loss=-1", "loss=nan", "loss=inf", "loss=x"])
def test_a_margin_that_is_none_is_refused(argument, capsys):
    assert main(["report", "somewhere", "--margin", argument]) == 2
    assert f"{argument!r} is not METRIC=VALUE with a number above 0" in capsys.readouterr().err
