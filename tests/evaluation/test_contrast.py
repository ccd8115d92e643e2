"""What single items of a task are compared by."""

import math

import numpy as np
import pytest

from crrelu_llm.evaluation.contrast import contrast, shown
from crrelu_llm.evaluation.measured import Item, Measured, linearised, shares_of


def example(responses, target="1", options=("a", "b", "c")):
    return Item(id=0, group="", prompt="?", options=list(options), target=target, responses=responses)


def result(items, examples, higher_is_better=None, shares=None):
    return Measured(
        metrics={}, items=items, examples=examples, higher_is_better=higher_is_better or {}, shares=shares or {}
    )


def test_multiple_choice_is_compared_by_the_lead_of_the_right_answer():
    examples = [example([-3.0, -1.0, -2.5]), example([-3.0, -4.0, -5.0], target="2")]
    found = contrast(result({"acc": [1.0, 0.0], "acc_norm": [1.0, 1.0]}, examples))
    assert (found.metric, found.higher_is_better) == ("margin", True)
    assert found.values == [1.5, -2.0]


@pytest.mark.parametrize(
    ("items", "examples", "metric"),
    [
        ({"loss": [1.0], "acc": [1.0]}, [example([-1.0], "word", ["word"])], "loss"),  # lambada: one option
        ({"acc": [0.4]}, [example([-1.0, -2.0, -3.0], "0")], "acc"),  # truthfulqa: a share, no right or wrong
        ({"exact_match,strict": [1.0]}, [example(["4"], "4", [])], "exact_match,strict"),
        ({"logp_accuracy": [1.0], "logp_margin": [0.3]}, [example([-1.0, -1.3], "0", "ab")], "logp_margin"),
        ({"reward_margin": [0.1], "logp_margin": [0.3]}, [example([-1.0, -1.3], "0", "ab")], "reward_margin"),
    ],
)
def test_other_tasks_are_compared_by_a_metric(items, examples, metric):
    found = contrast(result(items, examples))
    assert (found.metric, found.values) == (metric, items[metric])


def test_a_ratio_is_compared_by_each_items_own():
    """An item that did not change must not seem to, because the others did."""
    weights = np.array([10.0, 2000.0, 300.0])
    sums = np.array([[12.0, 1500.0, 250.0], [12.0, 1800.0, 240.0]])
    found = []
    for own in sums:
        shares = {"bits_per_byte": shares_of(own, weights)}
        found.append(contrast(result({"bits_per_byte": linearised(own, weights)}, [], shares=shares)))
    for value, own in zip(found, sums, strict=True):
        assert value.values == pytest.approx(own / weights, rel=1e-9)


@pytest.mark.parametrize("broken", [None, math.nan, -math.inf])
def test_a_response_that_is_no_number_gives_no_lead(broken):
    found = contrast(result({"acc": [1.0]}, [example([-1.0, broken, -2.0])]))
    assert (found.metric, found.values) == ("acc", [1.0])


def test_the_direction_is_the_tasks():
    assert contrast(result({"x": [1.0]}, [example([1.0])], {"x": False})).higher_is_better is False
    assert contrast(result({"loss": [1.0]}, [example([1.0])])).higher_is_better is False


def test_nothing_of_a_task_without_items():
    assert contrast(result({}, [])) is None


def test_what_is_shown_of_an_item():
    found = shown(example([-1.0, -2.0, -3.0]), example([-1.5, -1.0, -3.0]))
    assert found.prompt == "?"
    assert [(o.text, o.right, o.baseline, o.candidate) for o in found.options] == [
        ("a", False, -1.0, -1.5),
        ("b", True, -2.0, -1.0),
        ("c", False, -3.0, -3.0),
    ]
    written = shown(example(["four"], "4", []), example(["five"], "4", []))
    assert written.as_dict()["options"] == [{"text": "", "right": None, "baseline": "four", "candidate": "five"}]
