"""Renders the report's dict through the templates to HTML and Markdown."""

import html
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crrelu_llm.comparison.report import tables, text
from crrelu_llm.comparison.report.contents import Report, items_word
from crrelu_llm.comparison.report.plots import arm_key, pictures
from crrelu_llm.comparison.report.verdict import draw_verdict, notes

_READING = (
    "Candidate minus baseline, with the {confidence} interval. Rows over {items} × seeds speak of models trained anew "
    "and other {items}; rows over {items} alone, of these trained models (bootstrap interval); rows over seeds alone, "
    "of models trained anew on these {items} (Student's interval). p is that of a sign-flip permutation test unless "
    "marked. The adjusted p is corrected for the number of comparisons (Benjamini-Hochberg). A verdict needs an "
    "adjusted p below the level and an interval without 0. Detectable: the true difference that such a test, "
    "uncorrected, finds 4 times in 5 if the spread is as observed; a dash where no difference could be found, however "
    "large, or nothing varied. No worse: whether the interval rules out that the candidate is worse by more than the "
    "margin in brackets; equivalent, if it rules out better by more than that too."
)


def render_html(report: Report) -> str:
    """The report as one HTML file that loads nothing."""
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
    """The report as text."""
    environment = _environment(autoescape=False)
    environment.filters["md"] = _escape_markdown
    rendered = environment.get_template("report.md.j2").render(**_contents(report))
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def _contents(report: Report) -> dict[str, Any]:
    environment = dict(report.get("environment") or {})
    versions = environment.pop("versions", None)
    confidences = {entry["confidence"] for entry in report.get("comparisons", [])}
    return {
        "title": text.one_line(report.get("title") or "Comparison"),
        "created": str(report.get("created") or ""),
        "verdict": draw_verdict(report),
        "notes": notes(report),
        "overview": tables.overview(report),
        "results": tables.results(report),
        "swaps": tables.swaps(report),
        "comparisons": tables.comparisons(report),
        "failures": tables.failures(report),
        "data": tables.data(report),
        "baseline": str(report.get("baseline")),
        "reading": _READING.format(
            confidence=f"{max(confidences):.0%}" if confidences else "", items=items_word(report)
        ),
        "command": str(report.get("command") or ""),
        "versions": tables.settings(versions),
        "machine": tables.settings(environment),
        "recipe": tables.settings(report.get("recipe")),
    }


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("crrelu_llm.comparison.report"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _escape_markdown(value: Any) -> str:
    """Text that Markdown takes literally, also within a table."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", text.one_line(value))
    return html.escape(escaped, quote=False)
