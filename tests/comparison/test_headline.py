"""The headline, its picture, and what the arms are: what a reader sees first."""

import re

import pytest

from crrelu_llm.comparison.report.arms import arms
from crrelu_llm.comparison.report.contents import Verdict
from crrelu_llm.comparison.report.headline import headline, interval
from crrelu_llm.comparison.report.pages import page_of
from crrelu_llm.comparison.report.tables import comparisons

ENTRY = {
    "metric": "loss",
    "candidate": "crrelu",
    "baseline": "gelu",
    "difference": -0.0031,
    "ci_low": -0.005,
    "ci_high": -0.001,
    "confidence": 0.95,
    "unit": "both",
    "n": 60,
    "verdict": "better",
}
LOSS = {"loss": {"label": "loss", "higher_is_better": False, "format": "{:.4f}"}}
REPORT = {"baseline": "gelu", "metrics": LOSS, "arms": []}


def about(outcome="undecided", seeds=3, **entry):
    return Verdict("…", outcome, "crrelu", {}, ENTRY | entry, seeds)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (about("better"), "Better: crrelu's loss is 0.0031 lower than gelu's"),
        (about("worse", difference=0.002), "Worse: crrelu's loss is 0.0020 higher than gelu's"),
        (
            about(equivalence_margin=0.01, equivalent=True),
            "Undecided: crrelu and gelu differ by less than 0.01 in loss",
        ),
        (about(equivalence_margin=0.01, no_worse=True), "Undecided: crrelu is not worse than gelu by 0.01 in loss"),
        (about(), "Undecided: 3 seeds cannot tell crrelu from gelu in loss"),
        (about(seeds=1, equivalence_margin=0.01, equivalent=True), "Undecided: one seed cannot tell crrelu from gelu"),
        (about(seeds=0, unit="item"), "Undecided: 60 items cannot tell crrelu from gelu in loss"),
        (Verdict("…"), "Undecided: there is nothing to compare"),
        (Verdict("…", "better", "crrelu"), "Better: crrelu against gelu, over all tasks"),
    ],
)
def test_the_headline_says_the_verdict_in_some_ten_words(verdict, words):
    assert headline(REPORT, verdict) == words and len(words.split()) <= 13


@pytest.mark.parametrize("low, high", [(-0.005, 0.001), (-1e-6, 1e-6), (0.2, 0.3), (-3, -2.9)])
def test_the_interval_lies_within_its_picture(low, high):
    drawn = str(
        interval(REPORT, about(difference=(low + high) / 2, ci_low=low, ci_high=high, equivalence_margin=0.01))
    )
    places = [float(value) for value in re.findall(r' (?:x|x1|x2|cx)="([^"]+)"', drawn)]
    assert len(places) == 9 and all(0 <= place <= 360 for place in places)
    left, right = (float(re.search(rf'class="bar"[^>]* {name}="([^"]+)"', drawn)[1]) for name in ("x1", "x2"))
    assert left < right or high - low < 1e-5
    assert 'aria-label="loss: ' in drawn and "lower is better" in drawn


def test_there_is_no_picture_without_an_interval():
    assert interval(REPORT, about(ci_low=None)) is None and interval(REPORT, Verdict("…")) is None


def test_the_picture_escapes_what_the_report_says():
    report = REPORT | {"metrics": {"loss": LOSS["loss"] | {"label": '"><script>'}}}
    assert "<script>" not in str(interval(report, about()))


def test_arms_are_told_in_plain_words():
    def arm(name, activation, **options):
        sites = [{"original": "gelu_new"}]
        return {"arm": name, "activation": activation, "options": options, "patch": {"sites": sites}}

    report = {
        "arms": [
            {"arm": "native", "activation": "native", "options": {}, "patch": None},
            arm("relu", "relu", calibration="fit"),
            arm("plain", "crrelu", calibration="none", epsilon_per="layer", epsilon_learning_rate="0"),
            arm("some", "crrelu", calibration="refit", epsilon_per="channel", layers="0-5"),
        ]
    }
    told = [row[1].text for row in arms(report).rows]
    assert told == [
        "The model as it is, with its own activation (gelu_new).",
        "ReLU, fitted to compute what the model's own activation computed.",
        "CRReLU, put in the place of the model's own activation as it is; ε is frozen, one a layer.",
        "CRReLU in some layers only, fitted to compute what the model's own activation computed; the layer after "
        "it was fitted too; ε is learned, one a channel.",
    ]
    assert page_of({"trainer": "eval", "arms": report["arms"]}).arms(report).rows == []


def test_the_short_table_has_the_headline_over_seeds_and_items_alone():
    units = ("both", "item", "seed")
    entries = [
        ENTRY | {"unit": unit, "metric": metric, "p_value": 0.5} for unit in units for metric in ("loss", "other")
    ]
    report = REPORT | {"comparisons": entries, "headline": {"metric": "loss"}}
    for entry in entries:
        entry |= {"p_adjusted": 0.5, "n_seeds": 3}
    assert len(comparisons(report).rows) == 6
    ((metric, candidate, over, *_),) = comparisons(report, decisive=True).rows
    assert (metric.text, candidate.text, over.text) == ("loss", "crrelu", "60 items × 3 seeds")
