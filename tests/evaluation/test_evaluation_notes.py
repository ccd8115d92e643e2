"""What an evaluation's report says beside its numbers."""

from crrelu_llm.evaluation.measured import Item
from crrelu_llm.evaluation.report import _notes, _single_items
from crrelu_llm.evaluation.results import Result, Settings

SETTINGS = Settings(
    models={"a": "x", "b": "y"}, tasks=["t"], suite="s", baseline="a", reference=None, beta=0.1, limit=None,
    chat_template=False, dtype="float32", batch_size=1, max_length=None, device="cpu", command="c",
    tokenizers={"a": "0", "b": "0"}, results={}, data=[], environment={}, failures={}, created="now",
)  # fmt: skip


def item(options=(), target="", responses=("a",)):
    return Item(id=0, group="", prompt="?", options=list(options), target=target, responses=list(responses))


def result(items, examples):
    return Result(metrics={}, items=items, examples=examples, seconds=1.0)


def test_a_group_with_more_subtasks_than_the_limit():
    results = {"a": {"many": result({}, [item()] * 3), "few": result({}, [item()])}}
    said = "At most 2 items of each task were evaluated; of many, which has more subtasks, one item of each subtask."
    assert _notes(results, SETTINGS.but(limit=2)) == [said]
    assert _notes(results, SETTINGS.but(limit=3)) == ["At most 3 items of each task were evaluated."]


def test_single_items_of_a_metric_that_is_no_number_are_left_out():
    """A task's own metric may be NaN, null on disk, of one item; the report is written all the same."""
    results = {model: {"t": result({"f1": [1.0, last]}, [item()] * 2)} for model, last in (("a", 0.5), ("b", None))}
    assert _single_items(results, SETTINGS) == ([], [])
    results["b"]["t"] = result({"f1": [1.0, 1.0]}, [item()] * 2)
    changes, examples = _single_items(results, SETTINGS)
    assert (changes[0].better, changes[0].same, len(examples)) == (1, 1, 1)


def test_single_items_are_compared_by_what_both_have():
    """A reference model has no rewards, and a result of an earlier version no shares."""
    examples = [item(["x", "y"], "0", [-1.0, -2.0])] * 2
    pairs = {"a": {"logp_margin": [1.0, 2.0]}, "b": {"logp_margin": [2.0, 1.0], "reward_margin": [0.1, -0.1]}}
    results = {model: {"t": result(items, examples)} for model, items in pairs.items()}
    assert [entry.metric for entry in _single_items(results, SETTINGS)[0]] == ["t/logp_margin"]
    ratio = result({"bits_per_byte": [1.0, 2.0]}, examples)
    results = {"a": {"t": ratio}, "b": {"t": ratio.but(shares={"bits_per_byte": [0.2, 2.8]})}}
    changes, _ = _single_items(results, SETTINGS)
    assert changes[0].same == 2
