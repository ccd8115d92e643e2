"""Turns the reports of run.py into one table of all comparisons, corrected together, and one figure.

    python tables.py OUTPUT_DIR RESULTS_DIR

Writes RESULTS_DIR/question.md, question.png (the tasks), extras.png (the questions about the swap), and
<model>/<task>/report.{json,md} of each comparison without the texts of its data. A comparison that is not in OUTPUT_DIR
keeps the report that it has in RESULTS_DIR. Names the comparisons that were not run.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from run import BETAS, EXTRAS, PLAIN, SETTINGS, tasks

from crrelu_llm.cli.compare import write
from crrelu_llm.comparison.matrix import is_done
from crrelu_llm.comparison.tuning import TUNING
from crrelu_llm.report.contents import grids, runs
from crrelu_llm.report.schema import Report
from crrelu_llm.statistics.paired import Comparison, adjust

REACH = 0.05  # nats; values beyond are only given as numbers
COLOURS = {"better": "#0b7a53", "worse": "#b03a12", "undecided": "#5c626b"}


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
    text = "\n\n".join(["# All comparisons", _differences(rows), *_details(reports), _missing(reports)])
    (args.results_dir / "question.md").write_text(text + "\n", encoding="utf-8")
    extras = [row for row in rows if row.task in EXTRAS]
    _draw([row for row in rows if row not in extras], args.results_dir / "question.png")
    if extras:
        _draw(extras, args.results_dir / "extras.png")
    print(args.results_dir / "question.md")


def _losses(model: str, task: str, report: Report) -> list[Row]:
    """The tests of the loss over seeds and items, which the study corrects together."""
    return [
        Row(model, task + "".join(f", β {value:g}" for value in found.grid.values()), found)
        for found in report.comparisons
        if (found.metric, found.unit) == ("loss", "both")
    ]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def _arm(name: str) -> str:
    return name.replace(PLAIN, "crrelu, plain swap")


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
        interval = f"{_signed(found.ci_low)} to {_signed(found.ci_high)}"
        p = "–" if found.p_adjusted is None else f"{found.p_adjusted:.2g}"
        detectable = found.smallest_detectable
        cells = [row.model, row.task, _arm(found.baseline), _arm(found.candidate)]
        cells += [_signed(found.difference), interval, p, found.verdict]
        cells += ["–" if detectable is None else f"{detectable:.4f}", "yes" if found.equivalent else ""]
        lines.append(_row(*cells))
    return "\n".join(lines)


def _details(reports: dict[tuple[str, str], Report]) -> list[str]:
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
                    _arm(arm.arm),
                    rate + edge,
                ]
                cells += ["–" if before is None else f"{before:.4f}", _spread(losses)]
                cells += [f"{len(done)} of {len(planned)}"]
                cells += [f"{sum(seconds) / len(seconds):.0f}" if seconds else "–", f"{peak / 2**20:.0f}"]
                lines.append(_row(*cells))
    took = f"Training took {total / 3600:.2f} hours, the tries {tried / 3600:.2f}"
    took += f" without those of {', '.join(untimed)}, whose time was not kept" if untimed else ""
    return ["\n".join([*lines, "", f"\\* at the edge of the tried values. {took}."])]


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


def _draw(rows: list[Row], path: Path) -> None:
    groups: dict[str, list[Comparison]] = {}
    for row in rows:
        title = f"{row.model}, {row.task}: loss minus {_arm(row.found.baseline)}'s"
        groups.setdefault(title, []).append(row.found)
    lines: list[tuple[str, Comparison | None]] = []
    for title, members in groups.items():
        lines += [(title, None), *((_arm(entry.candidate), entry) for entry in members)]
    figure = Figure(figsize=(8, 0.27 * len(lines) + 0.9), layout="constrained")
    axes = figure.subplots()
    left = axes.get_yaxis_transform()
    for y, (label, entry) in zip(range(0, -len(lines), -1), lines, strict=True):
        axes.text(0.0, y, label, transform=left, va="center", fontsize=8, weight="normal" if entry else "bold")
        if entry is None or entry.ci_low is None:
            continue
        colour = COLOURS[entry.verdict]
        said = f"{_signed(entry.difference)} ({_signed(entry.ci_low)} to {_signed(entry.ci_high)})"
        axes.text(1.01, y, said, transform=left, va="center", fontsize=8, color=colour)
        ends = [min(max(end, -REACH), REACH) for end in (entry.ci_low, entry.ci_high)]
        axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        if abs(entry.difference) <= REACH:
            axes.plot(entry.difference, y, "o", color=colour, markersize=4.5)
    axes.axvline(0, color="#1d2024", linewidth=0.8)
    axes.axvspan(-REACH, 0, color=COLOURS["better"], alpha=0.06, linewidth=0)
    ticks = [-REACH, -REACH / 2, 0, REACH / 2, REACH]
    axes.set(xlim=(-2.4 * REACH, REACH), ylim=(0.7 - len(lines), 0.7), yticks=[], xticks=ticks)
    axes.set_xlabel("left of 0 is better; 95 % interval over seeds and items", fontsize=8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=140, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    main()
