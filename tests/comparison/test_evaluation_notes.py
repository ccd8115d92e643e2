"""What an evaluation's report says beside its numbers."""

from crrelu_llm.comparison.evaluation import _notes


def test_a_group_with_more_subtasks_than_the_limit():
    results = {"a": {"many": {"examples": [{}] * 3, "notes": []}, "few": {"examples": [{}], "notes": []}}}
    settings = {"tokenizers": {"a": "0"}, "baseline": "a", "limit": 2}
    said = "At most 2 items of each task were evaluated; of many, which has more subtasks, one of each subtask."
    assert _notes(results, settings) == [said]
    assert _notes(results, settings | {"limit": 3}) == ["At most 3 items of each task were evaluated."]
