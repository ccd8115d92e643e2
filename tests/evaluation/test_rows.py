"""A row that cannot be used is refused with its number, before a model is loaded."""

import gzip

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

from suite_data import arc, blimp, pairs, prepared, write

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.preference import PreferenceTask


def _changed(rows, number, **columns):
    """Rows of which one has other columns; None takes a column away."""
    row = {key: value for key, value in (rows[number - 1] | columns).items() if value is not None}
    return [*rows[: number - 1], row, *rows[number:]]


_MC2 = {"question": "why", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
_PIQA = [{"goal": "a", "sol1": "b", "sol2": "c", "label": 1}] * 3
WRONG = {
    "a wrong answer": ("arc_easy", "arc-easy/test", _changed(arc(), 3, answerKey="X"), "row 3: ValueError"),
    "no answer": ("arc_easy", "arc-easy/test", _changed(arc(), 2, answerKey=None), "row 2: "),
    "no question": ("arc_easy", "arc-easy/test", _changed(arc(), 6, question=None), "row 6: .*question"),
    "no sentence": ("blimp", "blimp/blimp", _changed(blimp(), 5, sentence_bad=None), "row 5: "),
    "an empty sentence": ("blimp", "blimp/blimp", _changed(blimp(), 5, sentence_bad=""), "row 5: an answer is empty"),
    "no group": ("blimp", "blimp/blimp", _changed(blimp(), 12, uid=None), "row 12: .*uid"),
    "a label out of range": ("piqa", "piqa/validation", _changed(_PIQA, 2, label=2), "row 2: the right answer is 2"),
    "an empty text": ("lambada_openai", "lambada/test", [{"text": "a b"}, {"text": ""}], "row 2: the text to score"),
    "labels cut short": (
        "truthfulqa_mc2",
        "truthfulqa/mc",
        _changed([_MC2] * 2, 2, mc2_targets={"choices": ["a", "b"], "labels": [1]}),
        "row 2: IndexError",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("task", "file", "rows", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named(data_dir, task, file, rows, message):
    write(data_dir / f"{file}.jsonl.gz", rows)
    with pytest.raises(InputError, match=rf"{task} cannot use {file}.jsonl.gz: {message}.*; check that") as caught:
        prepared(task, data_dir)
    assert "\n" not in str(caught.value)


def test_only_rows_that_will_be_evaluated_are_tried(data_dir):
    write(data_dir / "arc-easy" / "test.jsonl.gz", _changed(arc(), 3, answerKey="X"))
    assert prepared("arc_easy", data_dir, limit=2).rows == 2


def test_columns_that_a_task_does_not_read_may_be_empty(data_dir):
    write(data_dir / "arc-easy" / "test.jsonl.gz", _changed([row | {"hint": "x"} for row in arc()], 2, hint=None))
    assert prepared("arc_easy", data_dir).rows == 6


def test_templates_are_compiled_once(data_dir, monkeypatch):
    from lm_eval import utils

    compiled = []
    original = utils.env.from_string
    monkeypatch.setattr(utils.env, "from_string", lambda text: compiled.append(text) or original(text))
    write(data_dir / "arc-easy" / "test.jsonl.gz", arc(50))
    prepared("arc_easy", data_dir)
    assert len(compiled) < 20  # lm-eval's own look at the first row compiles them too


def _message(**columns):
    return {"chosen": [{"role": "assistant", "content": "yes"} | columns]}


BAD_PAIRS = {
    "no content": (_message(content=None), "role and content"),
    "no role": (_message(role=None), "role and content"),
    "an empty answer": ({"chosen": []}, "two answers that are not empty"),
    "no prompt": ({"prompt": None, "chosen": pairs(3)[1]["rejected"]}, "must go on after"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_row_that_is_no_pair_is_named(data_dir, columns, message):
    rows = pairs(3)
    rows[1] |= columns
    path = write(data_dir / "mine.jsonl.gz", rows)
    with pytest.raises(InputError, match=rf"the task p cannot use .*mine.jsonl.gz: row 2: .*{message}"):
        PreferenceTask("p", path, None, False)
    assert PreferenceTask("p", path, 1, False).rows == 1


def test_pages_are_items_of_a_text_file(data_dir):
    with gzip.open(data_dir / "wikitext-2" / "valid.txt.gz", "at") as file:
        file.write(" = Page = \n")
    assert prepared("wikitext", data_dir).rows == 4
