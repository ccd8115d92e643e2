"""Turns the reports of run.py into tables of all comparisons and pictures.

    python tables.py OUTPUT_DIR RESULTS_DIR

Writes into RESULTS_DIR:
    question.md     all tables
    question.png    CRReLU minus GELU
    arms.png        the other arms
    extras.png      the questions about the swap
    training.png    the difference during the longer training
    <model>/<task>/report.{json,md} of each comparison, without the texts of its data

A comparison that is not in OUTPUT_DIR keeps the report that it has in RESULTS_DIR.
"""

import argparse
from pathlib import Path

from figures import draw_differences, draw_training
from run import SETTINGS, tasks
from sections import FAMILIES, PICTURES, Row, arm_name, arms, differences, fits, missing, rows_of, tries, untouched

from crrelu_llm.cli.compare import write
from crrelu_llm.comparison.matrix import is_done
from crrelu_llm.comparison.tuning import TUNING
from crrelu_llm.report.schema import Report
from crrelu_llm.statistics.paired import Comparison, adjust


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("results_dir", type=Path)
    args = parser.parse_args()
    reports = {}
    for model in SETTINGS:
        for task in tasks(model):
            place, target = args.output_dir / model / task, args.results_dir / model / task
            runs = (path for path in place.glob("*/**/seed-*/run.json") if TUNING not in path.parts)
            if any(is_done(path.parent) for path in runs):
                write(place, with_examples=False)
                target.mkdir(parents=True, exist_ok=True)
                for name in ("report.json", "report.md"):
                    (target / name).write_text((place / name).read_text(encoding="utf-8"), encoding="utf-8")
            if (target / "report.json").is_file():
                reports[model, task] = Report.read(target / "report.json")
    if not reports:
        parser.error(f"no comparison in {args.output_dir} or {args.results_dir}; run run.py first")
    rows = [row for key, report in reports.items() for row in rows_of(*key, report)]
    for family in FAMILIES:  # each is corrected by itself
        members = [row for row in rows if row.family == family]
        for row, found in zip(members, adjust([row.found for row in members]), strict=True):
            row.found = found
        if members:
            draw_differences(_lines(members), args.results_dir / PICTURES[family])
    parts = [differences(rows), untouched(reports), fits(reports), arms(reports), tries(reports), missing(reports)]
    (args.results_dir / "question.md").write_text("\n\n".join(["# All comparisons", *parts]) + "\n", encoding="utf-8")
    if long := reports.get(("nano", "long")):
        draw_training(long.trajectories, long.baseline, args.results_dir / "training.png")
    print(args.results_dir / "question.md")


def _lines(rows: list[Row]) -> list[tuple[str, Comparison | None]]:
    """A line for each comparison; with several candidates, under a title for each model and task."""
    if len({row.found.candidate for row in rows}) == 1:
        return [(f"{row.model}, {row.task}", row.found) for row in rows]
    lines: list[tuple[str, Comparison | None]] = []
    title = ""
    for row in rows:
        if title != (title := f"{row.model}, {row.task}: loss minus {arm_name(row.found.baseline, row.model)}'s"):
            lines.append((title, None))
        lines.append((arm_name(row.found.candidate, row.model), row.found))
    return lines


if __name__ == "__main__":
    main()
