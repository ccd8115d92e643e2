"""The headline, its picture, and what the arms are: what a reader sees first."""

import re

import pytest
from synthetic import report_of

from crrelu_llm.report.arms import arms
from crrelu_llm.report.contents import Verdict
from crrelu_llm.report.headline import headline, interval
from crrelu_llm.report.pages import page_of
from crrelu_llm.report.schema import Headline, Metric
from crrelu_llm.report.tables import comparisons
from crrelu_llm.statistics.paired import Comparison

ENTRY = Comparison(
    metric="loss",
    higher_is_better=False,
    candidate="crrelu",
    baseline="gelu",
    baseline_mean=3.0,
    candidate_mean=2.9969,
    difference=-0.0031,
    ci_low=-0.005,
    ci_high=-0.001,
    confidence=0.95,
    p_value=0.5,
    p_adjusted=0.5,
    unit="both",
    n=60,
    n_seeds=3,
    verdict="better",
    test="t",
)
REPORT = report_of(baseline="gelu").but(metrics={"loss": Metric(label="loss", format="{:.4f}")})


def about(outcome="undecided", seeds=3, **entry):
    return Verdict("…", outcome, "crrelu", {}, ENTRY.but(**entry), seeds)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (about("better"), "Better: crrelu's loss is 0.0031 lower than gelu's"),
        (about("worse", difference=0.002), "Worse: crrelu's loss is 0.0020 higher than gelu's"),
        (
            about(equivalence_margin=0.01, equivalent=True),
            "Undecided: crrelu and gelu differ by less than 0.01 in loss",
        ),
        (about(equivalence_margin=0.01, no_worse=True), "Undecided: crrelu is at most 0.01 worse than gelu in loss"),
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
    report = REPORT.but(metrics={"loss": Metric(label='"><script>')})
    assert "<script>" not in str(interval(report, about()))


def test_arms_are_told_in_plain_words():
    def arm(name, activation, **options):
        sites = [{"original": "gelu_new"}]
        return {"arm": name, "activation": activation, "options": options, "patch": {"sites": sites}, "runs": []}

    told_of = [
        {"arm": "native", "activation": "native", "options": {}, "patch": None, "runs": []},
        arm("relu", "relu", calibration="fit"),
        arm("plain", "crrelu", calibration="none", epsilon_per="layer", epsilon_learning_rate="0"),
        arm("some", "crrelu", calibration="refit", epsilon_per="channel", layers="0-5"),
        arm("mixed", "0-2,5=relu,3-=mish", calibration="fit", activation_l1="0.1"),
    ]
    told = [row[1].text for row in arms(report_of(arms=told_of)).rows]
    assert told == [
        "The unpatched model, with its own activation (gelu_new).",
        "ReLU, fitted to imitate the model's own activation.",
        "CRReLU, in place of the model's own activation, without fitting; ε is frozen, one per layer.",
        "CRReLU in some layers only, fitted to imitate the model's own activation; the layer after it was fitted "
        "too; ε is learned, one per channel.",
        "ReLU in layers 0-2,5, Mish in layers 3-, fitted to imitate the model's own activation; an L1 term pushes its "
        "outputs towards 0.",
    ]
    frozen = report_of(arms=told_of, recipe={"epsilon_learning_rate": 0.0, "activation_l1": 0.1})
    assert arms(frozen).rows[3][1].text.endswith("pushes its outputs towards 0; ε is frozen, one per channel.")
    unknown = [{"arm": "crrelu", "activation": "crrelu", "options": {}, "patch": None, "runs": []}]  # of --after
    plain = report_of(arms=unknown, recipe={"calibration": "none", "epsilon_per": "layer"})
    assert arms(plain).rows[0][1].text.endswith("without fitting; ε is learned, one per layer.")
    evaluated = report_of(trainer="eval", arms=told_of)
    assert page_of(evaluated).arms(evaluated).rows == []


def test_the_short_table_has_the_headline_over_seeds_and_items_alone():
    units = ("both", "item", "seed")
    entries = [ENTRY.but(unit=unit, metric=metric) for unit in units for metric in ("loss", "other")]
    report = REPORT.but(comparisons=entries, headline=Headline(metric="loss"))
    assert len(comparisons(report).rows) == 6
    ((metric, candidate, over, *_),) = comparisons(report, decisive=True).rows
    assert (metric.text, candidate.text, over.text) == ("loss", "crrelu", "60 items × 3 seeds")
