"""The report: what it says, that it says what the dict says, and that no text from outside can break it."""

import html
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import synthetic
from report_pages import EVIL, Page

from crrelu_llm import report as reports
from crrelu_llm.errors import InputError
from crrelu_llm.report import text as spelling
from crrelu_llm.report.render import render_csv
from crrelu_llm.report.schema import Report

COMPARISON_FIELDS = {
    "metric", "higher_is_better", "baseline", "candidate", "baseline_mean", "candidate_mean", "difference", "ci_low",
    "ci_high", "confidence", "p_value", "p_adjusted", "unit", "n", "verdict",
}  # fmt: skip


def verdict_sentence(report):
    """The sentence of a report as report.json has it."""
    return reports.verdict_sentence(Report.of(report))


def write(report, folder):
    """Writes and reads back: the JSON, the Markdown, and the HTML with its parsed page."""
    reports.write_report(report if isinstance(report, Report) else Report.of(report), folder)
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == [], "every tag must be closed"
    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return numbers, (folder / "report.md").read_text(encoding="utf-8"), source, page


def rows(page, label):
    """A table's rows as dicts by heading."""
    heading, *body = page.tables[label]
    return [dict(zip(heading, row, strict=True)) for row in body]


@pytest.fixture(scope="module")
def sft():
    return synthetic.sft_report(items=60)


@pytest.fixture(scope="module")
def complete(sft, tmp_path_factory):
    return write(sft, tmp_path_factory.mktemp("complete"))


def test_json_holds_the_contract_and_the_verdict(complete, sft):
    numbers, _, _, _ = complete
    assert {"recipe", "environment", "arms", "comparisons", "data"} <= set(numbers)
    for arm in numbers["arms"]:
        assert {"arm", "activation", "runs"} <= set(arm)
        for run in arm["runs"]:
            wanted = {
                "seed",
                "status",
                "metrics",
                "train_seconds",
                "tokens_per_second",
                "peak_memory_bytes",
                "epsilon",
            }
            assert wanted <= set(run)
    for comparison in numbers["comparisons"]:
        assert set(comparison) >= COMPARISON_FIELDS
    assert all({"name", "rows", "sha256"} <= set(entry) for entry in numbers["data"])
    assert numbers == sft | {"verdict": verdict_sentence(sft)}


def test_the_steps_are_those_of_the_training_not_of_its_last_log_line(tmp_path):
    logged = [{"step": 50, "loss": 2.0}]
    report = synthetic.sft_report(items=20)
    for steps, shown in ((60, "60"), (None, "50")):
        for arm in report["arms"]:
            for run in arm["runs"]:
                run |= {"history": logged, "steps": steps}
        (tmp_path / shown).mkdir()
        _, markdown, _, _ = write(report, tmp_path / shown)
        assert f"- Steps: {shown}\n" in markdown


def test_results_show_the_numbers_of_the_runs(complete, sft):
    _, markdown, _, page = complete
    table = rows(page, "Results by arm")
    assert [row["arm"] for row in table] == [arm["arm"] for arm in sft["arms"]]
    for row, arm in zip(table, sft["arms"], strict=True):
        values = [run["metrics"]["perplexity"] for run in arm["runs"]]
        assert row["perplexity"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert row["perplexity right after the swap"] == f"{arm['before']['perplexity']:.2f}"
        assert row["training time"] == f"{np.mean([run['train_seconds'] for run in arm['runs']]):.0f} s"
        assert row["peak memory"] == f"{arm['runs'][0]['peak_memory_bytes'] / 2**20:.0f} MiB"
        assert row["runs"] == "3 of 3"
        assert f"| {row['arm']} | 3 of 3 | {row['perplexity right after the swap']} |" in markdown


def test_comparisons_show_the_numbers_of_the_dict(complete, sft):
    _, markdown, _, page = complete
    table = rows(page, "Paired differences")
    assert len(table) == len(sft["comparisons"])
    assert {row["metric"] for row in table[:9]} == {"perplexity"}, "the headline metric comes first"
    for entry in sft["comparisons"]:
        over = {"item": "60 documents", "seed": "3 seeds", "both": "60 documents × 3 seeds"}[entry["unit"]]
        label = sft["metrics"][entry["metric"]]["label"]
        place = (label, entry["candidate"], over)
        (row,) = [r for r in table if (r["metric"], r["candidate"], r["paired over"]) == place]
        assert row["verdict"] == entry["verdict"]
        assert row["adjusted p"] == spelling.p_value(entry["p_adjusted"])
        assert (row["detectable"] == "–") == (entry["unit"] == "seed"), "3 seeds find nothing by a permutation test"
        if entry["metric"] == "perplexity":
            assert row["difference"] == f"{entry['difference']:+.2f}".replace("-", "−")
            ends = f"{entry['ci_low']:+.2f} to {entry['ci_high']:+.2f}"
            assert row["interval"] == ends.replace("-", "−")
        assert f"| {label} | {entry['candidate']} | {over} | {entry['verdict']} | {row['difference']} |" in markdown


def test_sentence_names_interval_items_and_agreeing_seeds():
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=60)
    (entry,) = [c for c in report["comparisons"] if (c["metric"], c["unit"]) == ("perplexity", "both")]
    assert verdict_sentence(report) == (
        f"After fine-tuning, crrelu's perplexity is {entry['difference']:.2f} higher than gelu's (95% interval "
        f"{entry['ci_low']:.2f} to {entry['ci_high']:.2f}, paired over 60 documents × 3 seeds; a true difference of "
        f"{entry['smallest_detectable']:.2f} would be found 4 times in 5; 3 of 3 seeds agree): worse."
    )


def test_sentence_speaks_of_the_best_placed_candidate(sft):
    assert "crrelu:calibration=fit (the best of 2 CRReLU arms)" in verdict_sentence(sft)


def test_sentence_turns_an_improvement_round(sft):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=60) | {"baseline": "crrelu"}
    for entry in report["comparisons"]:
        swapped = {"baseline": "crrelu", "candidate": "gelu", "difference": -entry["difference"], "verdict": "better"}
        entry |= swapped | {"ci_low": -entry["ci_high"], "ci_high": -entry["ci_low"]}
    assert re.search(r"gelu's perplexity is [\d.]+ lower than crrelu's .*: better\.$", verdict_sentence(report))


def test_seeds_that_disagree_leave_it_undecided():
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=60)
    report["arms"][1]["runs"][0]["metrics"]["perplexity"] = 1.0
    assert verdict_sentence(report).endswith("2 of 3 seeds agree): undecided, because the seeds disagree.")


def test_loss_by_document_stands_in_for_perplexity():
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=60)
    report["comparisons"] = [c for c in report["comparisons"] if c["metric"] == "loss" or c["unit"] == "seed"]
    means = [np.mean([run["metrics"]["perplexity"] for run in arm["runs"]]) for arm in report["arms"]]
    assert re.search(r"crrelu's loss is 0.07\d\d higher than gelu's", verdict_sentence(report))
    assert f"(perplexity {means[1]:.2f} against {means[0]:.2f}; 95% interval" in verdict_sentence(report)
    report["comparisons"] = [c for c in report["comparisons"] if c["unit"] == "seed"]
    assert "paired over 3 seeds" in verdict_sentence(report)
    assert verdict_sentence(report).endswith("undecided, because a test over 3 seeds cannot go below p = 0.25.")


def _without_baseline(report):
    report["arms"].pop(0)


def _failed_baseline(report):
    for seed in range(3):
        synthetic.fail(report, "gelu", seed)


def _no_pair(report):
    synthetic.fail(report, "gelu", 0)
    synthetic.fail(report, "crrelu", 1)
    synthetic.fail(report, "crrelu", 2)


def _baseline_only(report):
    report["arms"].pop(1)


def _no_comparisons(report):
    report["comparisons"] = []


def _diverged(report):
    for entry in report["comparisons"]:
        entry |= {"difference": None, "note": "1 of 60 pairs hold a value that is not a finite number"}


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_baseline, "the baseline gelu is not among the arms."),
        (_failed_baseline, "no run of the baseline gelu gave a perplexity."),
        (_no_pair, "no seed gave a perplexity both in gelu and in crrelu."),
        (_baseline_only, "there is no arm besides gelu."),
        (_no_comparisons, "the report has no comparison of perplexity."),
        (_diverged, "1 of 60 pairs hold a value that is not a finite number."),
    ],
)
def test_what_cannot_be_decided_says_why_and_still_renders(spoil, reason, tmp_path):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=60)
    spoil(report)
    numbers, markdown, source, _ = write(report, tmp_path)
    assert numbers["verdict"].endswith("cannot be decided, because " + reason)
    assert html.escape(numbers["verdict"]) in source
    assert numbers["verdict"] in markdown


@pytest.mark.usefixtures("sketched")
def test_one_seed_is_never_a_verdict(tmp_path):
    numbers, _, source, page = write(synthetic.sft_report(seeds=1, items=60), tmp_path)
    assert "cannot be decided, because only one seed finished in both arms" in numbers["verdict"]
    assert 'class="verdict undecided"' in source
    assert "±" not in "".join(row["perplexity"] for row in rows(page, "Results by arm"))


def test_few_seeds_come_with_a_warning(complete):
    _, markdown, source, _ = complete
    for rendered in (markdown, source):
        assert "With 3 seeds, no permutation test over seeds can go below p = 0.25" in rendered
        assert "no bootstrap interval over seeds can have a confidence above 75%" in rendered


def test_failed_runs_are_listed_and_missing_numbers_are_dashes(tmp_path):
    report = synthetic.sft_report(items=60)
    for seed in range(3):
        synthetic.fail(report, "relu", seed, "RuntimeError: it broke\n  in two lines")
    _, markdown, source, page = write(report, tmp_path)
    failed = rows(page, "Runs that did not finish")
    assert [(row["arm"], row["seed"], row["error"]) for row in failed] == [
        ("relu", str(seed), "RuntimeError: it broke in two lines") for seed in range(3)
    ]
    (relu,) = [row for row in rows(page, "Results by arm") if row["arm"] == "relu"]
    assert relu["runs"] == "0 of 3"
    for column in ("perplexity", "loss", "training time", "tokens/s", "peak memory"):
        assert relu[column] == "–"
    assert "3 of 12 runs did not finish" in source
    assert "RuntimeError: it broke in two lines" in markdown
    assert not re.search(r"\b(None|nan|NaN)\b", markdown + re.sub(r"<[^>]*>", "", source))


@pytest.mark.usefixtures("sketched")
def test_a_grid_has_a_row_for_each_value(tmp_path):
    report = synthetic.dpo_report(items=80, betas=(0.05, 0.1, 0.3))
    numbers, markdown, source, page = write(report, tmp_path)
    labels = ["beta = 0.05", "beta = 0.1", "beta = 0.3"]
    assert [row["grid"] for row in rows(page, "Results by arm")] == labels * 2
    differences = rows(page, "Paired differences")
    assert len(differences) == len(report["comparisons"]) == 18
    assert {row["grid"] for row in differences} == set(labels)
    means = {
        run["grid"]["beta"]: np.mean(
            [r["metrics"]["reward_accuracy"] for r in report["arms"][0]["runs"] if r["grid"] == run["grid"]]
        )
        for run in report["arms"][0]["runs"]
    }
    assert f"with beta = {max(means, key=means.get)}, where gelu does best" in numbers["verdict"]
    for label in labels:
        assert f"Training loss ({label})" in source
        assert label in markdown


@pytest.mark.usefixtures("sketched")
def test_a_reference_metric_stands_beside_without_a_verdict(tmp_path):
    _, _, source, page = write(synthetic.dpo_report(items=80), tmp_path)
    controls = [row for row in rows(page, "Paired differences") if row["metric"] == "“the longer answer wins”"]
    assert [row["verdict"] for row in controls] == ["reference"]
    assert "“the longer answer wins” (reference)" in page.tables["Results by arm"][0]
    assert "is 58.3%; it is a control" in source


@pytest.mark.usefixtures("sketched")
def test_mcnemar_is_marked(tmp_path):
    _, _, _, page = write(synthetic.dpo_report(seeds=1, items=80), tmp_path)
    (row,) = [row for row in rows(page, "Paired differences") if row["paired over"] == "80 preference pairs"]
    assert row["p"].endswith(" (McNemar)")


@pytest.mark.parametrize("fields", [{}, {"baseline": "gelu", "title": "Nothing yet"}])
def test_an_empty_report_renders(fields, tmp_path):
    numbers, markdown, source, _ = write(synthetic.report_of(**fields), tmp_path)
    assert "cannot be decided" in numbers["verdict"]
    assert "There is no pair of runs to compare." in markdown
    assert "<figure>" not in source


@pytest.mark.usefixtures("sketched")
def test_runs_without_metrics_render(tmp_path):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=20) | {"metrics": {}, "comparisons": []}
    for arm in report["arms"]:
        arm |= {"before": {}, "patch": None}
        for run in arm["runs"]:
            run |= {"metrics": {}, "history": [], "epsilon": {}, "epsilon_start": {}}
    _, _, _, page = write(report, tmp_path)
    assert page.tables["Results by arm"][0] == ["arm", "runs", "training time", "tokens/s", "peak memory"]


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    report = synthetic.sft_report(arms=("gelu", "crrelu"), items=20)
    synthetic.fail(report, "gelu", 2, EVIL)
    report = json.loads(json.dumps(report).replace('"crrelu"', json.dumps(EVIL)))
    report |= {"title": EVIL, "command": EVIL, "recipe": {EVIL: EVIL}, "baseline": "gelu"}
    report["data"][0]["name"] = EVIL
    report["environment"]["versions"] = {EVIL: EVIL}
    for arm in report["arms"]:
        arm["activation"] = "crrelu" if arm["arm"] == EVIL else "gelu"
    _, markdown, source, page = write(report, tmp_path)
    assert "script" not in page.tags
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    unfenced = re.sub(r"^    .*$", "", markdown, flags=re.MULTILINE)  # an indented block is literal
    assert "<script" not in unfenced
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", unfenced, flags=re.MULTILINE)]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "cells must stay in their columns"
    assert "$b$" in source, "a dollar sign is no formula"


def test_html_stands_alone_and_its_ids_are_unique(complete):
    _, _, source, page = complete
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", source)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "object", "embed"})
    assert len(page.ids) == len(set(page.ids))
    targets = [address.removeprefix("#") for address in page.addresses] + re.findall(r"url\(#([^)]+)\)", source)
    assert targets
    assert set(targets) <= set(page.ids)


def test_pictures_are_described_and_follow_the_theme(complete):
    _, _, source, _ = complete
    figures = re.findall(r"<figure>.*?</figure>", source, flags=re.DOTALL)
    assert len(figures) == 4
    style = source[source.index("<style>") : source.index("</style>")]
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]+"', figure)
        assert "<figcaption>" in figure
        assert "#0101" not in figure
        assert "#0102" not in figure
        for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", figure)):
            assert style.count(f"{variable}:") >= 2, "each colour must have a light and a dark value"
    assert "prefers-color-scheme: dark" in style


def test_arms_keep_their_colour(complete, sft):
    _, _, source, _ = complete
    for slot, arm in enumerate(arm["arm"] for arm in sft["arms"]):
        keys = re.findall(rf"<svg class=\"swatch\"[^>]*>((?:(?!</svg>).)*)</svg>{re.escape(arm)}<", source)
        assert len(keys) >= 2
        assert all(f"var(--arm-{slot})" in key for key in keys)


def test_writing_twice_gives_the_same_files(complete, sft, tmp_path):
    _, markdown, source, _ = complete
    _, markdown_again, source_again, _ = write(sft, tmp_path)
    assert (markdown, source) == (markdown_again, source_again)


def test_numbers_that_json_lacks_become_null_and_dashes(tmp_path):
    report = Report.of(synthetic.sft_report(arms=("gelu", "crrelu"), items=20))
    run = report.arms[1].runs[0]
    run.metrics.update(perplexity=math.inf, loss=math.nan, steps=np.int64(3), ratio=np.float32(0.5))
    run.history[3]["loss"] = math.nan
    numbers, _, _, _ = write(report, tmp_path)
    read = numbers["arms"][1]["runs"][0]["metrics"]
    assert (read["perplexity"], read["loss"], read["steps"], read["ratio"]) == (None, None, 3, 0.5)


@pytest.mark.usefixtures("sketched")
def test_a_failed_write_leaves_the_old_report_whole(tmp_path, monkeypatch):
    report = Report.of(synthetic.sft_report(arms=("gelu", "crrelu"), items=20))
    reports.write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.json", "report.md", "report.html"}

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        reports.write_report(report.but(title="new"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "pattern", "shown"),
    [
        (None, "{:.2f}", "–"),
        (0.0, "{:.2f}", "0.00"),
        (0.0004, "{:.2f}", "0.0004"),
        (-1.5, "{:.2f}", "−1.50"),
        (3.2e9, "{:.2f}", "3.2e+09"),
        (0.615, "{:.1%}", "61.5%"),
        (0.00001, "{:.1%}", "0.0%"),
    ],
)
def test_numbers_are_spelled_so_that_none_vanishes(value, pattern, shown):
    assert spelling.number(value, pattern) == shown


def test_p_values_and_units_are_spelled_for_readers():
    assert [spelling.p_value(p) for p in (None, 1.0, 0.25, 0.0321, 0.0002)] == ["–", "1", "0.25", "0.032", "< 0.001"]
    assert spelling.signed(-0.0123, "{:.1%}") == "−1.23 points"
    assert spelling.interval(-0.01, 0.02, "{:.1%}") == "−1.00 to +2.00 points"
    assert [spelling.duration(s) for s in (None, 2.34, 75, 600, 9000)] == ["–", "2.3 s", "75 s", "10.0 min", "2.5 h"]
    assert [spelling.memory(b) for b in (None, 5 * 2**20, 3 * 2**30)] == ["–", "5 MiB", "3.0 GiB"]


def test_csv_has_a_line_for_every_metric_of_every_run():
    import csv

    run = {
        "seed": 0,
        "status": "done",
        "grid": {"beta": "1"},
        "before": {"loss": 2.0},
        "metrics": {"loss": 1.5, "x": None},
    }
    arms = [{"arm": 'a,"b"', "activation": "crrelu", "runs": [run, {"seed": 1, "status": "failed", "metrics": {}}]}]
    rows = list(csv.reader(render_csv(synthetic.report_of(arms=arms)).splitlines()))
    assert rows[1:] == [
        ['a,"b"', "crrelu", "beta=1", "0", "done", "before", "loss", "2.0"],
        ['a,"b"', "crrelu", "beta=1", "0", "done", "after", "loss", "1.5"],
        ['a,"b"', "crrelu", "beta=1", "0", "done", "after", "x", ""],
    ]


def test_a_committed_report_is_read_and_written_as_it_is():
    """Of every version so far: nothing is added, left out or moved."""
    paths = sorted((Path(__file__).parents[2] / "eval" / "results").rglob("report.json"))
    assert len(paths) >= 19
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        written = Report.read(path).as_dict()
        assert written == found and json.dumps(written) == json.dumps(found), path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda report: report.pop("arms"), "arms: missing"),
        (lambda report: report["arms"][1]["runs"][0].pop("seed"), "arms[1].runs[0].seed: missing"),
        (lambda report: report["comparisons"][0].update(unit="seeds"), 'comparisons[0].unit: "seeds" is not one of'),
        (lambda report: report["metrics"]["loss"].update(colour=1), "metrics.loss.colour: no such field"),
        (lambda report: report.update(baseline=None), "baseline: null is not a text"),
    ],
)
def test_a_damaged_report_is_one_line(spoil, message, tmp_path):
    report = json.loads(json.dumps(synthetic.sft_report(arms=("gelu", "crrelu"), items=20)))
    spoil(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(InputError) as error:
        Report.read(path)
    said = str(error.value)
    assert said.startswith(f"{path}: {message}") and said.endswith("write it again with `crrelu report`")
    path.write_text("{")
    with pytest.raises(InputError, match=r"--report x: cannot be read"):
        Report.read(path, "--report x")


class TestSparsity:
    """The zeros after each layer: a table, a picture, and words, where an arm is sparse."""

    def sparse(self, **shares):
        """A report whose runs have the share of zeros, and of what is at its offset, of each arm."""
        report = synthetic.sft_report(("gelu", "relu", "crrelu", "crrelu:calibration=fit"), seeds=2, items=20)
        for arm in report["arms"]:
            zeros, offset = shares.get(arm["activation"], (0.0, None))
            for run in arm["runs"]:
                sites = [zeros * (1 + 0.1 * run["seed"]) for _ in synthetic.SITES]
                at = {} if offset is None else dict.fromkeys(synthetic.SITES, offset)
                run["sparsity"] = {
                    "tokens": 99,
                    "zeros": dict(zip(synthetic.SITES, sites, strict=True)),
                    "at_offset": at,
                }
                run["sparsity_before"] = {"tokens": 99, "zeros": dict.fromkeys(synthetic.SITES, 0.5 * zeros)}
        return report

    def test_of_a_sparse_arm(self, tmp_path):
        _, markdown, source, page = write(self.sparse(relu=(0.6, None), crrelu=(0.001, 0.123)), tmp_path)
        table = page.tables["Zeros after the activations"]
        assert table[0] == ["layer", "gelu", "relu", "crrelu", "crrelu:calibration=fit"]
        assert table[1] == ["all, before", "0.0%", "30.0%", "0.1%", "0.1%"]
        assert table[2] == ["all", "0.0%", "63.0%", "0.1% (12.3%)", "0.1% (12.3%)"]
        assert [row[0] for row in table[3:]] == [str(layer) for layer in range(6)]
        assert (
            "on 99 tokens of the evaluation data" in markdown
            and "CRReLU itself is not sparse (crrelu 0.1%" in markdown
        )
        assert "gives the offset of its channel" in markdown
        assert "Zeros after the activation of each layer" in source and "at its offset" in source

    def test_nothing_where_no_arm_is(self, tmp_path):
        _, markdown, source, _ = write(self.sparse(), tmp_path)
        _, old, older, _ = write(synthetic.sft_report(seeds=2, items=20), tmp_path / "old")
        assert not any("Zeros after" in text for text in (markdown, source, old, older))
