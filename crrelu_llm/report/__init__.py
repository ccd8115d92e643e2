"""The report of a comparison: report.json, report.md and report.html from one `Report`."""

import json
from pathlib import Path

from crrelu_llm.errors import reading
from crrelu_llm.files import plain, write_text, writing
from crrelu_llm.report.pages import page_of
from crrelu_llm.report.render import render_html, render_markdown
from crrelu_llm.report.schema import Report

__all__ = ["verdict_sentence", "write_report"]


def verdict_sentence(report: Report) -> str:
    """The verdict of a report in one plain sentence, with its numbers."""
    return page_of(report).draw(report).sentence


def write_report(report: Report, output_dir: Path) -> Report:
    """Writes report.json, report.md and report.html.

    Each file is written under another name and then renamed, report.json first, so that an interrupted call leaves
    only complete files.

    Args:
        report: The report; its numbers need not be finite.
        output_dir: The directory of the files, created if it does not exist.

    Returns:
        The report as written, with its verdict sentence, and with None for each number that is not finite.
    """
    with reading(f"the report of {output_dir}", "one of its input files is damaged", ours=True):
        report = Report.of(plain(report.as_dict()))
    report = report.but(verdict=verdict_sentence(report))
    numbers = json.dumps(report.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    output_dir = Path(output_dir)
    texts = {"report.json": numbers + "\n", "report.md": render_markdown(report), "report.html": render_html(report)}
    with writing(f"the report in {output_dir}"):
        for name, content in texts.items():
            write_text(output_dir / name, content)
    return report
