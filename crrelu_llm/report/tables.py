"""The report's tables as rows of cells, for both HTML and Markdown."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from crrelu_llm.report import text
from crrelu_llm.report.contents import describe, everything, find_arm, grids, metrics, of_runs, paired_over, runs
from crrelu_llm.report.schema import Report
from crrelu_llm.statistics.paired import Comparison

_TESTS = {"mcnemar": " (McNemar)", "t": " (t)"}


@dataclass
class Cell:
    """One cell: its text, the arm whose colour is shown before it, and the verdict that it states."""

    text: str
    arm: str | None = None
    verdict: str | None = None


@dataclass
class Table:
    """A table: column headings, rows of cells, and how many columns on the left have words, not numbers."""

    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    words: int = 1


def overview(report: Report) -> list[tuple[str, str]]:
    """What was compared, as name and value."""
    recipe, environment = report.recipe, report.environment
    seeds = sorted({run.seed for run in everything(report)})
    trained = [run.steps for run in everything(report) if run.steps is not None]
    logged = [entry["step"] for run in everything(report) for entry in run.history]  # for reports without `steps`
    steps = trained or logged
    data = dict.fromkeys(entry.name for entry in report.data)
    facts = [
        ("Model", recipe.get("model_name_or_path")),
        ("Trainer", report.trainer_label or report.trainer),
        ("Data", ", ".join(data) or recipe.get("dataset_name")),
        ("Baseline", report.baseline),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Steps", max(steps) if steps else recipe.get("max_steps")),
        ("Grid", "; ".join(text.grid_label(grid) for grid in grids(report) if grid)),
        ("Device", environment.get("device")),
        ("Processes", environment.get("processes")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def results(report: Report) -> Table:
    """A row for each arm (and grid value), with its metrics and its cost."""
    described, gridded = metrics(report), grids(report) != [{}]
    before = _before_metrics(report)
    columns = ["arm", *(["grid"] if gridded else []), "runs"]
    columns += [f"{described[m].label} right after the swap" for m in before]
    wilson = _accuracy_intervals(report)
    measured = {metric for metric, _, _ in wilson}
    columns += [
        d.label + (" (reference)" if d.reference else "") + (" [Wilson interval]" if metric in measured else "")
        for metric, d in described.items()
    ]
    table = Table([*columns, "training time", "tokens/s", "peak memory"], words=2 if gridded else 1)
    for arm in report.arms:
        for grid in grids(report):
            done, planned = runs(arm, grid), runs(arm, grid, finished=False)
            if gridded and not planned:
                continue
            row = [Cell(arm.arm, arm=arm.arm), *([Cell(text.grid_label(grid))] if gridded else [])]
            row.append(Cell(f"{len(done)} of {len(planned)}"))
            # A grid may change the patch, so a run's own numbers come first.
            swapped = next((run.before for run in planned if run.before), arm.before)
            row += [Cell(text.number(swapped.get(m), described[m].format)) for m in before]
            for metric, description in described.items():
                values = [run.metrics.get(metric) for run in done]
                ends = wilson.get((metric, arm.arm, text.grid_label(grid)), "")
                row.append(Cell(text.spread(values, description.format) + ends))
            seconds, _, peak = of_runs(done)
            row += [Cell(text.duration(seconds))]
            row += [Cell(text.spread([run.tokens_per_second for run in done], "{:,.0f}")), Cell(text.memory(peak))]
            table.rows.append(row)
    return table


def _accuracy_intervals(report: Report) -> dict[tuple[str, str, str], str]:
    """Wilson's intervals over items in brackets, by metric, arm and grid value."""
    found = {}
    for entry in report.comparisons:
        sides = (entry.baseline, entry.baseline_interval), (entry.candidate, entry.candidate_interval)
        for arm, ends in sides:
            if ends:
                said = text.ends(ends[0], ends[1], describe(report, entry.metric).format)
                found[entry.metric, arm, text.grid_label(entry.grid)] = f" [{said}]"
    return found


def decisive_entries(report: Report) -> list[Comparison]:
    """The comparisons of the headline metrics over seeds and items, or else over items, or else over seeds."""
    wanted = {report.headline.metric, *report.headline.metrics.values()}
    entries = [entry for entry in report.comparisons if entry.metric in wanted]
    units = {entry.unit for entry in entries}
    unit = next((unit for unit in ("both", "item", "seed") if unit in units), None)
    return [entry for entry in entries if entry.unit == unit]


def comparisons(report: Report, decisive: bool = False) -> Table:
    """The paired differences; the headline metric first, references without a verdict.

    Args:
        report: The report.
        decisive: Whether to show only `decisive_entries`, without the p before the correction.
    """
    gridded = grids(report) != [{}]
    columns = ["metric", "candidate", *(["grid"] if gridded else []), "paired over", "verdict"]
    columns += ["difference", "interval", *([] if decisive else ["p"]), "adjusted p", "detectable", "no worse"]
    table = Table(columns, words=5 if gridded else 4)
    entries = decisive_entries(report) if decisive else report.comparisons
    for entry in in_order(entries, report.headline.metric):
        description = describe(report, entry.metric)
        pattern = description.format
        verdict = "reference" if description.reference else entry.verdict
        row = [Cell(description.label), Cell(entry.candidate, arm=entry.candidate)]
        row += [Cell(text.grid_label(entry.grid))] if gridded else []
        row += [
            Cell(paired_over(report, entry)),
            Cell(verdict, verdict=verdict),
            Cell(text.signed(entry.difference, pattern)),
            Cell(text.interval(entry.ci_low, entry.ci_high, pattern)),
            *([] if decisive else [Cell(text.p_value(entry.p_value) + _TESTS.get(entry.test, ""))]),
            Cell(text.p_value(entry.p_adjusted)),
            Cell(text.size(entry.smallest_detectable, pattern)),
            Cell(_margin(entry, pattern)),
        ]
        table.rows.append(row)
    return table


def reading(report: Report) -> str:
    """How to read the table of differences, for the kinds of rows that it has."""
    entries, items = report.comparisons, report.items
    units = {entry.unit for entry in entries}
    confidence = f"{max(entry.confidence for entry in entries):.0%} " if entries else ""
    said = {
        "both": f"Rows over {items} × seeds generalise to new training runs and to other {items} (Student's "
        "interval with two sources of error).",
        "item": f"Rows over {items} alone apply to these trained models (bootstrap interval).",
        "seed": f"Rows over seeds alone generalise to new training runs, on these {items} (Student's interval).",
    }
    margins = any(entry.equivalence_margin is not None for entry in entries)
    alone = ", separately for the rows that the verdict counts" if any(entry.primary for entry in entries) else ""
    return " ".join(
        [
            f"Candidate minus baseline, with the {confidence}interval.",
            *(said[unit] for unit in said if unit in units),
            "p is from a sign-flip permutation test unless marked; the adjusted p is corrected for the number of "
            f"comparisons (Benjamini-Hochberg{alone}). A verdict needs an adjusted p below the level and an interval "
            "without 0. Detectable: the true difference that such a test, uncorrected, would find 4 times in 5 if the "
            "spread is as observed; a dash if it would find none, however large.",
            "No worse: yes if the interval rules out that the candidate is worse by more than the margin in "
            "brackets; equivalent if the interval also rules out that it is better by more than the margin; no if the "
            "interval shows that it is worse by more than the margin; otherwise not shown."
            if margins
            else "",
        ]
    ).strip()


def in_order(entries: list[Comparison], headline: str) -> list[Comparison]:
    """Sorts comparisons by metric, the headline first, then by candidate and grid value: both, items, seeds."""
    metric_order = list(dict.fromkeys([headline, *(entry.metric for entry in entries)]))
    row_order = list(dict.fromkeys(_row(entry) for entry in entries))
    return sorted(
        entries, key=lambda entry: (metric_order.index(entry.metric), row_order.index(_row(entry)), entry.unit)
    )


def swaps(report: Report) -> Table:
    """The patch of each arm, before any training; no rows if no arm has a patch report."""
    columns = ["arm", "original", "calibration", "sites", "left alone", "relative error"]
    table = Table(columns, words=3)
    for arm in report.arms:
        patch = arm.patch
        if not patch:
            continue
        options = patch.get("options") or {}
        originals = sorted({str(site.get("original")) for site in arm.sites})
        row = [Cell(arm.arm, arm=arm.arm), Cell(", ".join(originals) or text.MISSING)]
        errors = [site["relative_error"] for site in arm.sites if site.get("relative_error") is not None]
        level = options.get("calibration", "none") if errors else "none"
        per = f", ε per {patch.get('epsilon_per')}" if arm.activation == "crrelu" else ""
        row += [Cell("none" if level == "none" else level + per)]
        row += [Cell(str(len(arm.sites))), Cell(str(len(patch.get("skipped") or [])))]
        row += [Cell(text.number(statistics.fmean(errors) if errors else None, "{:.3f}"))]
        table.rows.append(row)
    return table


def tuning(report: Report) -> Table:
    """The headline metric of every try on the held-out training rows, and the chosen one; no rows without tuning."""
    tries = report.tuning.tries if report.tuning else []
    names = list(dict.fromkeys(name for entry in tries for name in entry.values))
    gridded = any(entry.grid for entry in tries)
    table = Table(["arm", *(["grid"] if gridded else []), "chosen", *names], words=3 if gridded else 2)
    for entry in tries:
        chosen = ", ".join(f"{key}={value}" for key, value in (entry.chosen or {}).items()) or text.MISSING
        row = [Cell(entry.arm, arm=entry.arm), *([Cell(text.grid_label(entry.grid))] if gridded else [])]
        row += [Cell(chosen + (" (at the edge of the tried values)" if entry.at_edge else ""))]
        table.rows.append(row + [Cell(text.number(entry.values.get(name), "{:.4f}")) for name in names])
    return table


def tuning_hint(report: Report) -> str:
    """How the tries were evaluated."""
    about = report.tuning
    if about is None:
        return ""
    seconds = sum(value or 0.0 for entry in about.tries for value in entry.train_seconds.values())
    took = f" Training took {text.duration(seconds)}." if seconds else ""
    return (
        f"The {describe(report, about.metric).label} on {about.rows} held-out training rows, with seed "
        f"{about.seed}. All arms have the same tries; the best try is used for all seeds.{took}"
    )


def failures(report: Report) -> Table:
    """Runs that did not finish, with their error on one line."""
    table = Table(["arm", "seed", "grid", "error"], words=4)
    for arm in report.arms:
        for run in arm.runs:
            if not run.done:
                error = text.one_line(run.error or text.MISSING)
                grid = text.grid_label(run.grid) or text.MISSING
                table.rows.append([Cell(arm.arm, arm=arm.arm), Cell(str(run.seed)), Cell(grid), Cell(error)])
    return table


def data(report: Report) -> Table:
    """The data sets, with the hashes that identify them."""
    table = Table(["data", "split", "SHA-256", "rows"], words=3)
    for entry in report.data:
        split = text.MISSING if entry.split is None else entry.split
        table.rows.append([Cell(entry.name), Cell(split), Cell(entry.sha256), Cell(str(entry.rows))])
    return table


def settings(values: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Nested settings as lines of name and value."""
    lines = []
    for name, value in (values or {}).items():
        if isinstance(value, dict):
            lines += [(f"{name}.{inner}", shown) for inner, shown in settings(value)]
        else:
            lines.append((name, text.MISSING if value is None else str(value)))
    return lines


def arm_slot(report: Report, name: str | None) -> int | None:
    """The number of an arm's colour: 0 for the baseline, then in the report's order; None if there is no such arm."""
    if find_arm(report, name) is None:
        return None
    others = [arm.arm for arm in report.arms if arm.arm != report.baseline]
    return others.index(name) + 1 if name in others else 0


def _margin(entry: Comparison, pattern: str) -> str:
    """The interval against the margin: `equivalent`, `yes`, `not shown` or `no`, and the margin."""
    margin, ends = entry.equivalence_margin, (entry.ci_low, entry.ci_high)
    if entry.no_worse is None or margin is None:
        return text.MISSING
    says = "equivalent" if entry.equivalent else "yes" if entry.no_worse else "not shown"
    if entry.verdict == "worse" and all(end is not None and abs(end) >= margin for end in ends):
        says = "no"
    return f"{says} ({text.size(margin, pattern)})"


def _row(entry: Comparison) -> tuple[str, str]:
    return entry.candidate, text.grid_label(entry.grid)


def _before_metrics(report: Report) -> list[str]:
    """The metrics measured right after the swap: the headline and perplexity, or else all."""
    present = [metric for arm in report.arms for metric in arm.before]
    known = metrics(report)
    wanted = dict.fromkeys((report.headline.metric, "perplexity"))
    chosen = [metric for metric in wanted if metric in present] or list(dict.fromkeys(present))
    return [metric for metric in chosen if metric in known]
