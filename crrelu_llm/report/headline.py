"""The verdict in about ten words, and its interval as a small picture."""

from typing import Any

from markupsafe import Markup

from crrelu_llm.report import text
from crrelu_llm.report.contents import Verdict, describe
from crrelu_llm.report.schema import Report

_WIDTH, _HEIGHT, _EDGE = 360, 64, 8


def headline(report: Report, verdict: Verdict) -> str:
    """The verdict in about ten words; the full sentence has the evidence."""
    name, baseline, entry = verdict.candidate, report.baseline, verdict.comparison
    if name is None:
        return "Undecided: there is nothing to compare"
    if entry is None or entry.difference is None:
        return f"{verdict.outcome.capitalize()}: {name} against {baseline}, over all tasks"
    about, difference = describe(report, entry.metric), entry.difference
    label, pattern = about.label, about.format
    if verdict.outcome != "undecided":
        side = "higher" if difference > 0 else "lower"
        size = text.size(difference, pattern)
        return f"{verdict.outcome.capitalize()}: {name}'s {label} is {size} {side} than {baseline}'s"
    if verdict.seeds == 1:
        return f"Undecided: one seed cannot tell {name} from {baseline}"
    margin = entry.equivalence_margin
    if margin is not None and (entry.equivalent or entry.no_worse):
        most = text.size(margin, pattern if pattern.endswith("%}") else "{:g}")
        if entry.equivalent:
            return f"Undecided: {name} and {baseline} differ by less than {most} in {label}"
        return f"Undecided: {name} is at most {most} worse than {baseline} in {label}"
    by = f"{verdict.seeds} seeds" if verdict.seeds else f"{entry.n} items"
    return f"Undecided: {by} cannot tell {name} from {baseline} in {label}"


def interval(report: Report, verdict: Verdict) -> Markup | None:
    """The interval of the difference as SVG: a bar with its mean, the zero, and the margin of equivalence shaded."""
    entry = verdict.comparison
    if entry is None or entry.difference is None or entry.ci_low is None or entry.ci_high is None:
        return None
    low, mean, high, margin = entry.ci_low, entry.difference, entry.ci_high, entry.equivalence_margin
    reach = 1.15 * max(abs(low), abs(high), abs(mean), margin or 0) or 1.0
    about = describe(report, entry.metric)

    def at(value: float) -> float:
        return round(_WIDTH / 2 + value / reach * (_WIDTH / 2 - _EDGE), 1)

    def label(value: float, x: float, y: int, anchor: str = "middle") -> str:
        words = text.signed(value, about.format) if value else "0"
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'

    band = ""
    if margin:
        band = (
            f'<rect class="band" x="{at(-margin)}" y="14" width="{round(at(margin) - at(-margin), 1)}" height="24"/>'
        )
    ends = text.interval(low, high, about.format)
    side = "higher is better" if about.higher_is_better else "lower is better"
    told = f"{about.label}: {text.signed(mean, about.format)}, {entry.confidence:.0%} interval {ends}; {side}"
    return (
        Markup(
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="%s">{band}'
            f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="8" y2="44"/>'
            f'<line class="bar" x1="{at(low)}" x2="{at(high)}" y1="26" y2="26"/>'
            f'<circle class="mean" cx="{at(mean)}" cy="26" r="5"/>'
            f"{label(0, at(0), 60)}{_ends(label, at, low, high)}</svg>"
        )
        % told
    )


def _ends(label: Any, at: Any, low: float, high: float) -> str:
    """The numbers above the ends of the bar, pushed apart if the bar is short, and kept within the picture."""
    left, right = at(low), at(high)
    if right - left < 60:
        left, right = (left + right) / 2 - 30, (left + right) / 2 + 30
    shift = max(0, 26 - left) - max(0, right - (_WIDTH - 26))
    return str(label(low, round(left + shift, 1), 10) + label(high, round(right + shift, 1), 10))
