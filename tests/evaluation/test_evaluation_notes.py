"""What an evaluation's report says beside its numbers."""

from crrelu_llm.evaluation.report import _notes, _single_items


def test_a_group_with_more_subtasks_than_the_limit():
    results = {"a": {"many": {"examples": [{}] * 3, "notes": []}, "few": {"examples": [{}], "notes": []}}}
    settings = {"tokenizers": {"a": "0"}, "baseline": "a", "limit": 2}
    said = "At most 2 items of each task were evaluated; of many, which has more subtasks, one of each subtask."
    assert _notes(results, settings) == [said]
    assert _notes(results, settings | {"limit": 3}) == ["At most 3 items of each task were evaluated."]


def test_single_items_of_a_metric_that_is_no_number_are_left_out():
    """A task's own metric may be NaN, null on disk, of one item; the report is written all the same."""
    example = {"group": "", "prompt": "?", "options": [], "target": "", "responses": ["a"]}
    task = {"higher_is_better": {}, "per_token": [], "examples": [example, example]}
    results = {model: {"f1": task | {"items": {"f1": [1.0, last]}}} for model, last in (("a", 0.5), ("b", None))}
    settings = {"baseline": "a", "tasks": ["f1"], "tokenizers": {"a": "x", "b": "x"}}
    assert _single_items(results, settings) == ([], [])
    results["b"]["f1"]["items"]["f1"] = [1.0, 1.0]
    changes, examples = _single_items(results, settings)
    assert (changes[0].better, changes[0].same, len(examples)) == (1, 1, 1)


def test_single_items_are_compared_by_what_both_have():
    """A reference model has no rewards, and a result of an earlier version no shares."""
    example = {"group": "", "prompt": "?", "options": ["x", "y"], "target": "0", "responses": [-1.0, -2.0]}
    task = {"higher_is_better": {}, "per_token": [], "examples": [example, example]}
    pairs = {"a": {"logp_margin": [1.0, 2.0]}, "b": {"logp_margin": [2.0, 1.0], "reward_margin": [0.1, -0.1]}}
    results = {model: {"pairs": task | {"items": items}} for model, items in pairs.items()}
    settings = {"baseline": "a", "tasks": ["pairs"], "tokenizers": {"a": "x", "b": "x"}}
    assert [entry.metric for entry in _single_items(results, settings)[0]] == ["pairs/logp_margin"]
    for side in results.values():
        side["pairs"]["items"] = {"bits_per_byte": [1.0, 2.0]}
    results["b"]["pairs"]["shares"] = {"bits_per_byte": [0.2, 2.8]}
    changes, _ = _single_items(results, settings)
    assert changes[0].same == 2
