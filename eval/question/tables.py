"""Turns the reports of run.py into one table of all comparisons, corrected together, and one figure.

    python tables.py OUTPUT_DIR RESULTS_DIR

Writes RESULTS_DIR/question.md, question.png (the tasks), extras.png (the questions about the swap), training.png (the
difference during the longer training), and <model>/<task>/report.{json,md} of each comparison without the texts of its
data. A comparison that is not in OUTPUT_DIR keeps the report that it has in RESULTS_DIR. Names the comparisons that
were not run.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from pictures import arm_name, draw_differences, draw_training, signed
from run import BETAS, EXTRAS, SETTINGS, tasks

from crrelu_llm.cli.compare import write
from crrelu_llm.comparison.matrix import is_done
from crrelu_llm.comparison.tuning import TUNING
from crrelu_llm.report.contents import grids, runs
from crrelu_llm.report.schema import Report
from crrelu_llm.statistics.paired import Comparison, adjust


@dataclass
class Row:
    """A comparison of one model on one task."""

    model: str
    task: str
    found: Comparison


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
    rows = [row for key, report in reports.items() for row in _losses(*key, report)]
    for row, found in zip(rows, adjust([row.found for row in rows]), strict=True):
        row.found = found
    parts = ["# All comparisons", _differences(rows), _details(reports), _tries(reports), _missing(reports)]
    text = "\n\n".join(parts)
    (args.results_dir / "question.md").write_text(text + "\n", encoding="utf-8")
    extras = [row for row in rows if row.task in EXTRAS]
    draw_differences(_groups([row for row in rows if row not in extras]), args.results_dir / "question.png")
    if extras:
        draw_differences(_groups(extras), args.results_dir / "extras.png")
    if long := reports.get(("nano", "long")):
        draw_training(long.trajectories, long.baseline, args.results_dir / "training.png")
    print(args.results_dir / "question.md")


def _losses(model: str, task: str, report: Report) -> list[Row]:
    """The tests of the loss over seeds and items, which the study corrects together."""
    return [
        Row(model, task + "".join(f", β {value:g}" for value in found.grid.values()), found)
        for found in report.comparisons
        if (found.metric, found.unit) == ("loss", "both")
    ]


def _groups(rows: list[Row]) -> dict[str, list[Comparison]]:
    """The comparisons of each model and task under a title."""
    groups: dict[str, list[Comparison]] = {}
    for row in rows:
        title = f"{row.model}, {row.task}: loss minus {arm_name(row.found.baseline)}'s"
        groups.setdefault(title, []).append(row.found)
    return groups


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _differences(rows: list[Row]) -> str:
    lines = [
        "Candidate minus baseline in loss (nats per token, mean over documents; for DPO nats per pair), with the 95 % "
        "interval over seeds and items; p is corrected (Benjamini-Hochberg) for all rows. Detectable: the true "
        "difference that such a test, uncorrected, would find 4 times in 5. Equal: a difference of 0.01 is ruled out.",
        "",
        _row(
            "model", "task", "baseline", "candidate", "difference", "interval", "p", "verdict", "detectable", "equal"
        ),
        _row(*["---"] * 4, *["---:"] * 3, "---", "---:", "---"),
    ]
    for row in rows:
        found = row.found
        interval = f"{signed(found.ci_low)} to {signed(found.ci_high)}"
        p = "–" if found.p_adjusted is None else f"{found.p_adjusted:.2g}"
        detectable = found.smallest_detectable
        cells = [row.model, row.task, arm_name(found.baseline), arm_name(found.candidate)]
        cells += [signed(found.difference), interval, p, found.verdict]
        cells += ["–" if detectable is None else f"{detectable:.4f}", "yes" if found.equivalent else ""]
        lines.append(_row(*cells))
    return "\n".join(lines)


def _details(reports: dict[tuple[str, str], Report]) -> str:
    """For each arm: the loss before and after, the chosen learning rate, time and memory."""
    lines = [
        "## Arms",
        "",
        "Losses here are means over tokens (for DPO over pairs), ± the standard deviation over seeds; the differences "
        "above are means over documents.",
        "",
        _row("model", "task", "arm", "rate", "loss before", "loss after", "runs", "seconds per run", "peak MiB"),
        _row(*["---"] * 3, *["---:"] * 6),
    ]
    total = tried = 0.0
    untimed = []
    for (model, task), report in reports.items():
        tries = report.tuning.tries if report.tuning else []
        tried += sum(seconds or 0.0 for entry in tries for seconds in entry.train_seconds.values())
        untimed += [f"{model}/{task}"] if tries and not any(entry.train_seconds for entry in tries) else []
        for arm in report.arms:
            for grid in grids(report):
                planned, done = runs(arm, grid, finished=False), runs(arm, grid)
                if not planned:
                    continue
                tuned = next((entry for entry in tries if (entry.arm, entry.grid) == (arm.arm, grid)), None)
                rate = (tuned.chosen if tuned and tuned.chosen else {}).get("learning_rate", "–")
                edge = "*" if tuned and tuned.at_edge else ""
                losses = [run.metrics["loss"] for run in done]
                before = next((run.before["loss"] for run in planned if run.before), None)
                seconds = [run.train_seconds for run in done if run.train_seconds]
                peak = max((run.peak_memory_bytes or 0 for run in done), default=0)
                total += sum(seconds)
                cells = [
                    model,
                    task + "".join(f", β {value:g}" for value in grid.values()),
                    arm_name(arm.arm),
                    rate + edge,
                ]
                cells += ["–" if before is None else f"{before:.4f}", _spread(losses)]
                cells += [f"{len(done)} of {len(planned)}"]
                cells += [f"{sum(seconds) / len(seconds):.0f}" if seconds else "–", f"{peak / 2**20:.0f}"]
                lines.append(_row(*cells))
    took = f"Training took {total / 3600:.2f} hours, the tries {tried / 3600:.2f}"
    took += f" without those of {', '.join(untimed)}, whose time was not kept" if untimed else ""
    return "\n".join([*lines, "", f"\\* at the edge of the tried values. {took}."])


def _tries(reports: dict[tuple[str, str], Report]) -> str:
    """The loss of each arm at each learning rate that was tried."""
    lines = [
        "## Learning rates",
        "",
        "The loss on held-out training rows after one training (one seed) at each rate; the other seeds use the "
        "rate with the lowest loss, in bold.",
        "",
        _row("model", "task", "arm", "rate: loss"),
        _row(*["---"] * 4),
    ]
    for (model, task), report in reports.items():
        for entry in report.tuning.tries if report.tuning else []:
            chosen = (entry.chosen or {}).get("learning_rate")
            cells = []
            for name, value in entry.values.items():
                rate = name.removeprefix("learning_rate=")
                cell = f"{rate}: {'–' if value is None else f'{value:.4f}'}"
                cells.append(f"**{cell}**" if rate == chosen else cell)
            label = task + "".join(f", β {value:g}" for value in entry.grid.values())
            lines.append(_row(model, label, arm_name(entry.arm), " · ".join(cells)))
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.4f}"


def _missing(reports: dict[tuple[str, str], Report]) -> str:
    left = [f"{model}/{task}" for model in SETTINGS for task in tasks(model) if (model, task) not in reports]
    return f"Not run: {', '.join(left) or 'nothing'}. β of DPO: {BETAS.replace(',', ' and ')}."


if __name__ == "__main__":
    main()
