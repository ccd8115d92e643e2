"""Renders the report to HTML and Markdown through the templates, and its metrics to CSV."""

import csv
import html
import io
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crrelu_llm.report import over_training, sparsity, tables, text
from crrelu_llm.report.drawing import arm_key
from crrelu_llm.report.examples import examples
from crrelu_llm.report.headline import headline, interval
from crrelu_llm.report.pages import page_of
from crrelu_llm.report.plots import pictures
from crrelu_llm.report.schema import Report


def render_html(report: Report) -> str:
    """The report as one self-contained HTML file."""
    environment = _environment(autoescape=True)
    contents = _contents(report)
    verdict = contents["verdict"]
    drawn = pictures(report, verdict.candidate, verdict.grid)
    return environment.get_template("report.html.j2").render(
        **contents,
        pictures=drawn,
        svg=lambda picture: Markup(picture.svg),  # made by matplotlib, which escapes its text
        arm_key=lambda name: arm_key(report, name) if tables.arm_slot(report, name) is not None else None,
    )


def render_markdown(report: Report) -> str:
    """The report as Markdown."""
    environment = _environment(autoescape=False)
    environment.filters["md"] = escape_markdown
    rendered = environment.get_template("report.md.j2").render(**_contents(report))
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def render_csv(report: Report) -> str:
    """The metrics of every run as CSV, one per line, for the reader's own statistics."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["arm", "activation", "grid", "seed", "status", "when", "metric", "value"])
    for arm in report.arms:
        for run in arm.runs:
            grid = " ".join(f"{key}={value}" for key, value in run.grid.items())
            about = [arm.arm, arm.activation, grid, run.seed, run.status]
            for when, metrics in (("before", run.before), ("after", run.metrics)):
                table.writerows([*about, when, name, value] for name, value in metrics.items())
    return lines.getvalue()


def _contents(report: Report) -> dict[str, Any]:
    environment = dict(report.environment)
    versions = environment.pop("versions", None)
    page = page_of(report)
    verdict = page.draw(report)
    return {
        "title": text.one_line(report.title),
        "created": report.created,
        "verdict": verdict,
        "headline": headline(report, verdict),
        "interval": interval(report, verdict),
        "arms": page.arms(report),
        "notes": page.notes(report),
        "overview": page.overview(report),
        "results": page.results(report),
        "results_hint": page.results_hint,
        "swaps": tables.swaps(report),
        "cost": page.cost(report),
        "cost_hint": page.cost_hint,
        "sparsity": sparsity.table(report),
        "sparsity_hint": sparsity.hint(report),
        "comparisons": tables.comparisons(report),
        "decisive": tables.comparisons(report, decisive=True),
        "over_training": over_training.table(report),
        "over_training_metric": over_training.metric(report),
        "tuning": tables.tuning(report),
        "tuning_hint": tables.tuning_hint(report),
        "failures": tables.failures(report),
        "data": tables.data(report),
        "baseline": report.baseline,
        "reading": tables.reading(report),
        "examples": examples(report, verdict.candidate, verdict.grid),
        "candidate": verdict.candidate,
        "command": report.command,
        "versions": tables.settings(versions),
        "machine": tables.settings(environment),
        "recipe": tables.settings(report.recipe),
    }


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("crrelu_llm.report"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def escape_markdown(value: Any) -> str:
    """Escapes text so that Markdown shows it literally, also within a table."""
    escaped = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text.one_line(value))
    # Characters that would start a heading, a list, a rule or a fence at the beginning of a line.
    escaped = re.sub(r"^(#{1,6}(?=\s|$)|[-+](?=[\s-]|$))", r"\\\1", escaped)
    escaped = re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", escaped)
    return html.escape(escaped, quote=False)
