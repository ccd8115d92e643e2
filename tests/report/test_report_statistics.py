"""What the report says of its statistics: few seeds, what is ruled out, how the table is read."""

import re

import numpy as np
import pytest
import synthetic

from crrelu_llm.report import tables, verdict_sentence
from crrelu_llm.report.schema import Report
from crrelu_llm.report.trained import notes
from crrelu_llm.statistics.paired import compare_metric


def test_two_seeds_come_with_a_stronger_warning():
    assert any(
        "known only from one difference" in note for note in notes(Report.of(synthetic.sft_report(seeds=2, items=20)))
    )
    assert not any(
        "known only from one difference" in note for note in notes(Report.of(synthetic.sft_report(seeds=3, items=20)))
    )


def test_a_note_names_the_arms_whose_margins_follow_the_length():
    found = synthetic.dpo_report(items=20, betas=(0.1, 1))
    length = {"label": "r", "higher_is_better": True, "format": "{}", "reference": True}
    found["metrics"] = found["metrics"] | {"length_correlation": length}
    for arm in found["arms"]:
        for run in arm["runs"]:
            high = arm["arm"] != "gelu" and run["grid"]["beta"] == 1
            run["metrics"]["length_correlation"] = 0.91 + 0.01 * run["seed"] if high else -0.2
    (note,) = [note for note in notes(Report.of(found)) if "the length of the answers" in note]
    assert "of crrelu:calibration=fit follow the length of the answers (beta = 1)" in note
    assert "gelu −0.20, crrelu:calibration=fit 0.92." in note
    for entry in found["comparisons"]:
        entry["n"] = 19  # so few pairs may correlate by chance
    assert not any("the length of the answers" in note for note in notes(Report.of(found)))


def test_a_note_says_when_the_difference_lies_in_the_common_beginning():
    found = synthetic.sft_report(arms=("gelu", "relu", "crrelu"), items=20)
    about = {"label": "l", "higher_is_better": False, "format": "{}", "reference": True}
    found["metrics"] = found["metrics"] | {"loss_after_beginning": about}
    for arm, added in zip(found["arms"], (0.0, 0.009, 0.05), strict=True):
        for run in arm["runs"]:
            run["metrics"]["loss_after_beginning"] = run["metrics"]["loss"] + added
    (note,) = [note for note in notes(Report.of(found)) if "begin" in note]
    losses = [[run["metrics"]["loss"] for run in found["arms"][index]["runs"]] for index in (0, 2)]
    whole = np.mean(losses[1]) - np.mean(losses[0])
    assert f"crrelu minus gelu is +{whole:.4f} nats a token with them and +{whole + 0.05:.4f} without" in note


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((-0.4, 0.3), "differences of more than 0.50 are ruled out"),
        ((-0.9, 0.3), "a result worse by more than 0.50 is ruled out"),
        ((-0.9, 0.8), None),
    ],
)
def test_sentence_says_what_an_undecided_comparison_rules_out(ends, said):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=20)
    for entry in report["comparisons"]:
        low, high = ends
        entry |= {"difference": -0.1, "ci_low": low, "ci_high": high, "verdict": "undecided"}
        entry |= {"equivalence_margin": 0.5, "equivalent": low > -0.5 and high < 0.5, "no_worse": high < 0.5}
    sentence = verdict_sentence(Report.of(report))
    assert "undecided" in sentence
    assert re.findall(r"; ([^;]* ruled out)", sentence) == ([said] if said else [])


@pytest.mark.parametrize(
    ("ends", "verdict", "said"),
    [
        ((-0.4, 0.3), "undecided", "equivalent (0.50)"),
        ((-0.9, -0.2), "better", "yes (0.50)"),
        ((0.2, 0.9), "worse", "not shown (0.50)"),
        ((0.6, 0.9), "worse", "no (0.50)"),
    ],
)
def test_the_table_says_whether_worse_is_ruled_out(ends, verdict, said):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=20)
    entry = next(c for c in report["comparisons"] if (c["metric"], c["unit"]) == ("perplexity", "both"))
    low, high = ends
    entry |= {"ci_low": low, "ci_high": high, "difference": (low + high) / 2, "verdict": verdict}
    entry |= {"equivalence_margin": 0.5, "equivalent": low > -0.5 and high < 0.5, "no_worse": high < 0.5}
    row = tables.comparisons(Report.of(report | {"comparisons": [entry]})).rows[0]
    assert row[-1].text == said
    assert "equivalent if the interval also rules out that it is better by more" in tables.reading(Report.of(report))


def test_the_table_is_explained_by_the_rows_it_has():
    report = synthetic.sft_report(arms=("gelu", "crrelu"), seeds=1, items=20)
    report["comparisons"] = [c | {"equivalence_margin": None} for c in report["comparisons"] if c["unit"] == "item"]
    reading = tables.reading(Report.of(report))
    assert "Rows over documents alone" in reading
    assert "× seeds" not in reading and "Rows over seeds" not in reading and "No worse" not in reading


def test_seeds_that_are_copies_of_one_another_decide_nothing():
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=20)
    table = np.tile(np.linspace(3, 4, 20), (3, 1))
    names = {"baseline_name": "gelu", "candidate_name": "crrelu"}
    row = compare_metric("perplexity", False, table, table * 1.1, "both", **names)
    report["comparisons"] = [row.as_dict()]
    assert verdict_sentence(Report.of(report)).endswith(
        "undecided, because all 3 seeds gave exactly the same differences, so they are not separate training runs."
    )


def test_accuracies_stand_beside_their_intervals():
    report = synthetic.dpo_report(seeds=1, items=80)
    (item,) = [c for c in report["comparisons"] if c["unit"] == "item"]
    table = tables.results(Report.of(report))
    place = table.columns.index("reward accuracy [Wilson interval]")
    low, high = (100 * end for end in item["baseline_interval"])
    value = 100 * report["arms"][0]["runs"][0]["metrics"]["reward_accuracy"]
    assert table.rows[0][place].text == f"{value:.1f}% [{low:.1f} to {high:.1f}%]"
    assert low < value < high
