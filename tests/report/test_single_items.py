"""Single items: how they changed, which changed most, and how a report shows them."""

import json

import numpy as np
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from report_pages import EVIL, Page

from crrelu_llm.report import write_report
from crrelu_llm.report.render import escape_markdown
from crrelu_llm.report.schema import Report
from crrelu_llm.statistics import single_items

LOSS = single_items.About(
    metric="loss", label="loss", higher_is_better=False, format="{:.4f}", grid={}, baseline="gelu", candidate="crrelu"
)
pairs = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@given(pairs, st.booleans())
def test_changes_count_every_item_and_draw_a_sample(values, higher_is_better):
    before, after = map(list, zip(*values, strict=True))
    found = single_items.changes(LOSS.but(higher_is_better=higher_is_better), before, after)
    assert found.better + found.worse + found.same == found.items == len(values)
    rose = sum(y > x for x, y in values)
    assert (found.better if higher_is_better else found.worse) == rose
    assert len(found.points) == min(len(values), single_items.POINTS)
    for (x, y), ends in ((values[0], found.points[0]), (values[-1], found.points[-1])):
        assert ends == pytest.approx([x, y], rel=1e-5, abs=1e-9)


@given(pairs, st.booleans())
def test_no_item_changed_more_than_the_examples(values, higher_is_better):
    before, after = map(list, zip(*values, strict=True))
    about = LOSS.but(higher_is_better=higher_is_better)
    gains = (np.array(after) - np.array(before)) * (1 if higher_is_better else -1)
    chosen = single_items.most_changed(about, before, after)
    assert len(set(chosen)) == len(chosen)
    gained, lost = [i for i in chosen if gains[i] > 0], [i for i in chosen if gains[i] < 0]
    assert chosen == gained + lost, "no unchanged item is an example, the gains come first"
    for side, sign in ((gained, 1), (lost, -1)):
        rest = [sign * gain for i, gain in enumerate(gains) if sign * gain > 0 and i not in side]
        assert len(side) == min(single_items.EXAMPLES, int(np.sum(sign * gains > 0)))
        assert max(rest, default=0) <= min((sign * gains[i] for i in side), default=np.inf)


def report_with_items(prompt="A prompt", option="An option", given=(-1.5, -0.5)):
    """A comparison of two arms with what the report says of single items."""
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=300)
    rng = np.random.default_rng(0)
    before = rng.normal(4, 1, 300)
    after = before + rng.normal(0, 0.1, 300)
    report["changes"] = [single_items.changes(LOSS, before, after).as_dict()]
    options = [
        {"text": option, "right": right, "baseline": given[0], "candidate": given[1]} for right in (True, False)
    ]
    shown = single_items.Shown.of({"group": "a group", "prompt": prompt, "target": "0", "options": options})
    report["examples"] = [
        single_items.example(LOSS, i, (before[i], after[i]), shown).as_dict()
        for i in single_items.most_changed(LOSS, before, after)
    ]
    return report, before, after


def test_the_report_draws_the_changes_and_shows_the_examples(tmp_path):
    report, before, after = report_with_items()
    write_report(Report.of(report), tmp_path)
    source, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    better = int(np.sum(after < before))
    assert f"{better} of 300 better, {300 - better} worse" in source
    assert "200 of them are drawn" in source
    page = Page(source)
    assert page.open == []
    best = int(np.argmin(after - before))
    change = f"{before[best]:.4f} → {after[best]:.4f}"
    assert f"item {best}, a group" in source and change in source and change in markdown
    heading, *body = page.tables[f"Both arms on item {best}, a group"]
    assert heading == ["option", "right or wrong", "gelu", "crrelu"]
    assert body == [["An option", "right", "−1.500", "−0.500"], ["An option", "wrong", "−1.500", "−0.500"]]
    assert json.loads((tmp_path / "report.json").read_text())["changes"] == report["changes"]


@pytest.mark.usefixtures("sketched")
def test_answers_in_words_stand_side_by_side(tmp_path):
    report, _, _ = report_with_items(option="", given=("the answer is 4", "the answer is 5"))
    write_report(Report.of(report), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    shown = [table for label, table in page.tables.items() if label.startswith("Both arms on")]
    assert shown and all(table[1] == ["(empty)", "right", "the answer is 4", "the answer is 5"] for table in shown)


@pytest.mark.usefixtures("sketched")
def test_the_text_of_examples_is_escaped(tmp_path):
    report, _, _ = report_with_items(EVIL + "\n# not a heading", EVIL, (EVIL, EVIL))
    for entry in (*report["changes"], *report["examples"]):
        entry |= {"label": EVIL}
    write_report(Report.of(report), tmp_path)
    source, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    page = Page(source)
    assert page.open == [] and "script" not in page.tags
    assert "<script" not in source and "<script" not in markdown
    assert not any(line.startswith("# not a heading") for line in markdown.splitlines())


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("# a heading", r"\# a heading"),
        ("- a list", r"\- a list"),
        ("+ a list", r"\+ a list"),
        ("---", r"\---"),
        ("1986. A good year", r"1986\. A good year"),
        ("2) a list", r"2\) a list"),
        ("~~~ python", r"\~\~\~ python"),
        ("_so_ __init__", r"\_so\_ \_\_init\_\_"),
        ("arc_easy #1, -1.5 +0.5", "arc_easy #1, -1.5 +0.5"),
        ("+0.5", "+0.5"),
    ],
)
def test_a_text_that_stands_first_begins_no_block(text, escaped):
    assert escape_markdown(text) == escaped


@pytest.mark.usefixtures("sketched")
def test_other_candidates_and_grid_values_are_not_shown(tmp_path):
    report, _, _ = report_with_items("A prompt of another arm")
    for entry in (*report["changes"], *report["examples"]):
        entry |= {"candidate": "relu"}
    write_report(Report.of(report), tmp_path)
    source = (tmp_path / "report.html").read_text()
    assert "A prompt of another arm" not in source and "How each item changed" not in source
