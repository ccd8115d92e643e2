"""The parts specific to the report of an evaluation: the verdict over tasks, the table by task, the notes."""

from typing import get_args

from crrelu_llm.report import text
from crrelu_llm.report.contents import Verdict, candidates, describe, find_arm
from crrelu_llm.report.schema import Report
from crrelu_llm.report.tables import Cell, Table
from crrelu_llm.statistics.paired import Comparison, Outcome


def draw(report: Report) -> Verdict:
    """The verdict: on how many tasks the best model is better and worse than the baseline.

    Each task counts with one metric. "Better" needs at least one task with the verdict "better" after the correction,
    and none with "worse"; for "worse" it is the reverse.
    """
    baseline, names = report.baseline, candidates(report)
    subject = names[0] if len(names) == 1 else "any model"
    doubt = f"Whether {subject} is better or worse than {baseline} cannot be decided, because "
    if find_arm(report, baseline) is None:
        return Verdict(doubt + f"the baseline {baseline} is not among the models.")
    if not names:
        return Verdict(f"There is no model besides {baseline}, so nothing is compared.")
    entries = {name: _primary_comparisons(report, name) for name in names}
    if not any(entries.values()):
        return Verdict(doubt + "no task gave a number for both models; see the failed tasks.")
    notes = [entry.note for rows in entries.values() for entry in rows]
    if all(notes):
        return Verdict(doubt + f"{notes[0]}.")
    name = max((name for name in names if entries[name]), key=lambda name: _score(entries[name]))
    return _statement(report, name, entries[name], len(names))


def _primary_comparisons(report: Report, name: str) -> list[Comparison]:
    wanted = set(report.headline.metrics.values())
    of_arm = [entry for entry in report.comparisons if entry.candidate == name and entry.metric in wanted]
    return [entry for entry in of_arm if entry.difference is not None]


def _score(entries: list[Comparison]) -> int:
    verdicts = [entry.verdict for entry in entries]
    return verdicts.count("better") - verdicts.count("worse")


def _statement(report: Report, name: str, entries: list[Comparison], models: int) -> Verdict:
    baseline, reason = report.baseline, ""
    outcome: Outcome = "undecided"
    who = name if models == 1 else f"{name} (the best of {models} models)"
    sides = {verdict: [e for e in entries if e.verdict == verdict] for verdict in get_args(Outcome)}
    if sides["better"] and not sides["worse"]:
        outcome = "better"
    elif sides["worse"] and not sides["better"]:
        outcome = "worse"
    else:
        many = " after the correction for several tasks" if len(entries) > 1 else ""
        reason = ", because the tasks disagree" if sides["better"] else f", without a significant difference{many}"
    if len(entries) == 1:
        (entry,) = entries
        said = f"{_difference(report, entry)}, paired over {entry.n} items"
        return Verdict(f"{who} against {baseline}: {said}: {outcome}{reason}.", outcome, name, comparison=entry)
    parts = [
        f"{verdict} on {len(found)}" + (f" ({'; '.join(_difference(report, e) for e in found)})" if found else "")
        for verdict, found in sides.items()
        if verdict != "undecided"
    ]
    tasks = len(report.headline.metrics)
    absent = f"; {tasks - len(entries)} could not be compared" if tasks > len(entries) else ""
    return Verdict(
        f"Of {len(entries)} tasks, {who} is {' and '.join(parts)} than {baseline}, undecided on "
        f"{len(sides['undecided'])}{absent}: {outcome}{reason}.",
        outcome,
        name,
    )


def _difference(report: Report, entry: Comparison) -> str:
    about = describe(report, entry.metric)
    ends = text.interval(entry.ci_low, entry.ci_high, about.format)
    return f"{about.label} {text.signed(entry.difference, about.format)} ({entry.confidence:.0%} interval {ends})"


def results(report: Report) -> Table:
    """Metrics by model, task by task, with the intervals over items."""
    runs = [arm.runs[0] for arm in report.arms]
    table = Table(["task and metric", "items", *(arm.arm for arm in report.arms)], words=1)
    for metric, about in report.metrics.items():
        task = metric.partition("/")[0]
        counts = {str(run.items[task]) for run in runs if task in run.items}
        label = about.label + (" (reference)" if about.reference else "")
        row = [Cell(label), Cell("; ".join(sorted(counts)) or text.MISSING)]
        for run in runs:
            value = text.number(run.metrics.get(metric), about.format)
            ends = run.intervals.get(metric)
            if ends and None not in ends and ends[0] != ends[1]:
                value += f" [{text.number(ends[0], about.format)}, {text.number(ends[1], about.format)}]"
            row.append(Cell(value))
        table.rows.append(row)
    seconds = [Cell(text.duration(sum(run.seconds.values()) or None)) for run in runs]
    table.rows.append([Cell("evaluation time"), Cell(text.MISSING), *seconds])
    return table


def overview(report: Report) -> list[tuple[str, str]]:
    """What was evaluated, as name and value."""
    settings = report.recipe
    models = [f"{arm.arm} = {arm.model} ({arm.activation})" for arm in report.arms]
    facts = [
        ("Models", "; ".join(models)),
        ("Baseline", report.baseline),
        ("Suite", settings.get("suite")),
        ("Tasks", ", ".join(settings.get("tasks") or [])),
        ("Chat template", "applied" if settings.get("chat_template") else "not applied"),
        ("Reference model", settings.get("reference")),
        ("Dtype", settings.get("dtype")),
        ("Device", report.environment.get("device")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def notes(report: Report) -> list[str]:
    """The caveats beside the verdict."""
    found = list(report.notes)
    for arm in report.arms:
        if not arm.runs[0].done:
            found.append(f"The results of {arm.arm} are incomplete; the table of unfinished runs gives the reason.")
    found.append(
        "The intervals and tests are over the items of each task: they apply to these checkpoints, not to new "
        "training runs with other seeds."
    )
    return found
