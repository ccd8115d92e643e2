"""The pictures of the study: differences with their intervals, and a difference during training."""

from pathlib import Path

from matplotlib.figure import Figure
from sections import arm_name, signed

from crrelu_llm.report.schema import Trajectory
from crrelu_llm.statistics.paired import Comparison

REACH = 0.05  # nats; an interval that goes on beyond has an arrow, and values beyond are only given as numbers
COLOURS = {"better": "#0b7a53", "worse": "#b03a12", "undecided": "#5c626b"}
ARMS = ("#b03a12", "#0b5a7a", "#5c626b")


def draw_differences(lines: list[tuple[str, Comparison | None]], path: Path) -> None:
    """Draws a labelled line for each comparison; a label without one is a title."""
    figure = Figure(figsize=(8, 0.25 * len(lines) + 0.7), layout="constrained")
    axes = figure.subplots()
    left = axes.get_yaxis_transform()
    for y, (label, entry) in zip(range(0, -len(lines), -1), lines, strict=True):
        axes.text(0.0, y, label, transform=left, va="center", fontsize=8, weight="normal" if entry else "bold")
        if entry is None or entry.ci_low is None or entry.ci_high is None or entry.difference is None:
            continue
        colour = COLOURS[entry.verdict]
        said = f"{signed(entry.difference)} ({signed(entry.ci_low)} to {signed(entry.ci_high)})"
        axes.text(1.02, y, said, transform=left, va="center", fontsize=8, color=colour)
        ends = [min(max(end, -REACH), REACH) for end in (entry.ci_low, entry.ci_high)]
        axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        for end, cut, marker in ((-REACH, entry.ci_low < -REACH, "<"), (REACH, entry.ci_high > REACH, ">")):
            if cut:
                axes.plot(end, y, marker, color=colour, markersize=5, clip_on=False)
        if abs(entry.difference) <= REACH:
            axes.plot(entry.difference, y, "o", color=colour, markersize=4.5)
    axes.axvline(0, color="#1d2024", linewidth=0.8)
    axes.axvspan(-0.01, 0.01, color=COLOURS["undecided"], alpha=0.12, linewidth=0)
    ticks = [-REACH, -REACH / 2, 0, REACH / 2, REACH]
    axes.set(xlim=(-2.4 * REACH, REACH), ylim=(0.7 - len(lines), 0.7), yticks=[], xticks=ticks)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("nats; left of 0 is better; 95 % interval over seeds and items; the band is ±0.01", fontsize=8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=140, facecolor="white", bbox_inches="tight")


def draw_training(trajectories: list[Trajectory], baseline: str, path: Path) -> None:
    """Draws each candidate's difference from the baseline during training, one panel each, on one scale."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    panels = figure.subplots(1, len(trajectories), sharey=True, squeeze=False)[0]
    for axes, entry, colour in zip(panels, trajectories, ARMS * len(trajectories), strict=False):
        steps = [point.step for point in entry.points]
        low, high = [point.ci_low for point in entry.points], [point.ci_high for point in entry.points]
        if None not in (*low, *high):
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, [point.difference for point in entry.points], "o-", color=colour, markersize=3)
        axes.axhline(0, color="#1d2024", linewidth=0.8)
        axes.set_title(arm_name(entry.candidate), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("right", "top"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel(f"loss minus {baseline}'s (nats)", fontsize=8)
    figure.savefig(path, dpi=140, facecolor="white", bbox_inches="tight")
