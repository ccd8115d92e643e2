"""SHP and HH-RLHF in the columns they were published with."""

import pytest
from suite_data import language_model, write

from crrelu_llm.data.pairs import as_pair
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.preference import PreferenceTask, split


def test_shp_prefers_what_its_label_says():
    row = {"post_id": "x", "history": "a post", "human_ref_A": "one", "human_ref_B": "two", "labels": 1}
    prompt, (chosen, rejected) = split(row, "here")
    assert (prompt[0]["content"], chosen[0]["content"], rejected[0]["content"]) == ("a post", "one", "two")
    _, (chosen, rejected) = split(row | {"labels": 0}, "here")
    assert (chosen[0]["content"], rejected[0]["content"]) == ("two", "one")


def test_hh_transcripts_share_their_prompt():
    start = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: what\nis it\n\nAssistant:"
    prompt, (chosen, rejected) = split({"chosen": start + " good", "rejected": start + " bad\n\nno"}, "here")
    assert [(turn["role"], turn["content"]) for turn in prompt] == [
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "what\nis it"),
    ]
    assert [turn["content"] for turn in (*chosen, *rejected)] == ["good", "bad\n\nno"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "\n\nHuman: a", "rejected": "b"},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        {"chosen": "plain", "rejected": "text"},
    ],
)
def test_other_rows_stay_as_they_are(row):
    assert as_pair(row) == row


def test_plain_texts_without_a_prompt_are_refused():
    with pytest.raises(InputError, match="a pair needs a prompt"):
        split({"chosen": "plain", "rejected": "text"}, "here")


@pytest.mark.needs("lm_eval")
def test_files_of_both_are_evaluated_as_the_same_pairs(tmp_path, tiny_checkpoint, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    user, good, bad = "what is it", "one two", "three"
    start = f"\n\nHuman: {user}\n\nAssistant: "
    files = [
        write(tmp_path / "plain.jsonl.gz", [
            {"prompt": [{"role": "user", "content": user}], "chosen": [{"role": "assistant", "content": good}],
             "rejected": [{"role": "assistant", "content": bad}]}
        ]),
        write(tmp_path / "hh.jsonl.gz", [{"chosen": start + good, "rejected": start + bad}]),
        write(tmp_path / "shp.jsonl.gz", [
            {"history": user, "human_ref_A": bad, "human_ref_B": good, "labels": 0, "score_A": 1}
        ]),
    ]  # fmt: skip
    lm = language_model(tiny_checkpoint)
    found = [PreferenceTask("pairs", file, None, chat=False).run(lm) for file in files]
    assert found[0].items == found[1].items == found[2].items


def _talk(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def test_a_prompt_beside_conversations_that_repeat_it():
    row = {"prompt": "Q", "chosen": _talk("Q", "A"), "rejected": _talk("Q", "B"), "score": 1}
    assert as_pair(row) == {"score": 1, "prompt": _talk("Q"), "chosen": _talk("Q", "A")[1:],
                            "rejected": _talk("Q", "B")[1:]}  # fmt: skip


def test_a_prompt_beside_answers_alone():
    row = {"prompt": "Q", "chosen": _talk("Q", "A")[1:], "rejected": _talk("Q", "B")[1:]}
    assert as_pair(row)["prompt"] == _talk("Q")


def test_parts_of_a_content_are_one_text():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "!"}]}]
    prompt, answers = split({"prompt": _talk("Q"), "chosen": parts, "rejected": _talk("Q", "B")[1:]}, "row 1")
    assert prompt == _talk("Q")
    assert answers[0] == [{"role": "assistant", "content": "A!"}]


def test_a_prompt_of_messages_that_the_answers_repeat():
    row = {"prompt": _talk("Q"), "chosen": _talk("Q", "A"), "rejected": _talk("Q", "B")}
    assert as_pair(row) == {"prompt": _talk("Q"), "chosen": _talk("Q", "A")[1:], "rejected": _talk("Q", "B")[1:]}
