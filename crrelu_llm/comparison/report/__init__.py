"""The report of a comparison: report.json, report.md and report.html from one dict."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from crrelu_llm.comparison.report.pages import page_of
from crrelu_llm.comparison.report.render import render_html, render_markdown
from crrelu_llm.files import plain, remove, writing

__all__ = ["verdict_sentence", "write_report"]


def verdict_sentence(report: dict[str, Any]) -> str:
    """The verdict of a report in one plain sentence, with its numbers."""
    return page_of(report).draw(report).sentence


def write_report(report: dict[str, Any], output_dir: Path) -> None:
    """Writes report.json, report.md and report.html.

    Each file is written beside and renamed, the numbers (report.json) first, so that an interrupted call leaves
    whole files only.

    Args:
        report: The report's dict. `report["verdict"]` is set to the sentence that `verdict_sentence` gives.
        output_dir: Where to write; made if it does not exist.
    """
    numbers = plain(report)
    report["verdict"] = numbers["verdict"] = verdict_sentence(numbers)
    output_dir = Path(output_dir)
    with writing(f"the report in {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in output_dir.glob(".report-*.tmp"):
            remove(leftover)
        _replace(output_dir / "report.json", json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _replace(output_dir / "report.md", render_markdown(numbers))
        _replace(output_dir / "report.html", render_html(numbers))


def _replace(path: Path, text: str) -> None:
    # A temporary folder, not a temporary file: files made by tempfile are readable by their owner only.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report-", suffix=".tmp") as beside:
        new = Path(beside, path.name)
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
