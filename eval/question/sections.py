"""The sections of question.md, from the reports of the comparisons."""

import math
import statistics
from dataclasses import dataclass

from run import BETAS, DPO, EXTRAS, PLAIN, SETTINGS, tasks

from crrelu_llm.report.contents import grids, runs
from crrelu_llm.report.schema import Arm, Grid, Report, Run
from crrelu_llm.statistics.paired import Comparison, compare_metric

Reports = dict[tuple[str, str], Report]  # by model and task
# The families of comparisons and their pictures. Each is corrected by itself, so that side questions do not weaken the
# main one.
MAIN, OTHERS, SWAP = FAMILIES = ("CRReLU minus GELU", "The other arms", "Questions about the swap")
PICTURES = dict(zip(FAMILIES, ("question.png", "arms.png", "extras.png"), strict=True))


@dataclass
class Row:
    """A comparison of one model on one task. `gain` is what training gains for the baseline."""

    model: str
    task: str
    family: str
    found: Comparison
    gain: float | None

    @property
    def equal(self) -> str:
        """Whether a difference of 0.01 is ruled out. Arms that learn nothing are equal whatever they are."""
        margin = self.found.equivalence_margin or math.inf
        if self.gain is not None and self.gain < margin:
            return "not learnt"
        return "yes" if self.found.equivalent else ""


def rows_of(model: str, task: str, report: Report) -> list[Row]:
    """The tests of the loss over seeds and items."""
    rows = []
    for found in report.comparisons:
        if (found.metric, found.unit) != ("loss", "both"):
            continue
        family = SWAP if task in EXTRAS else MAIN if found.candidate == "crrelu" else OTHERS
        baseline = next(arm for arm in report.arms if arm.arm == report.baseline)
        before, after = _before(baseline, found.grid), _losses(runs(baseline, found.grid))
        gain = before - statistics.fmean(after) if before is not None and after else None
        rows.append(Row(model, label(task, found.grid), family, found, gain))
    return rows


def label(task: str, grid: Grid) -> str:
    """A task with its grid values in words."""
    return task + "".join(f", {'β' if key == 'beta' else 'rate'} {value:g}" for key, value in grid.items())


def arm_name(name: str, model: str = "") -> str:
    """An arm's name for readers."""
    native = "native" if "gelu" in SETTINGS.get(model, SETTINGS["smollm2"]).arms else "native (GELU)"
    return name.replace(PLAIN, "crrelu, plain swap").replace("native", native)


def signed(value: float | None) -> str:
    """A difference with its sign."""
    if value is None:
        return "–"
    return f"{value:+.4f}".replace("-", "−") if round(value, 4) else "0.0000"


def differences(rows: list[Row]) -> str:
    """A table for each family."""
    lines = [
        "Candidate minus baseline in loss (nats per token, mean over documents; for DPO nats per pair), with the 95 % "
        "interval over seeds and items. p is corrected (Benjamini-Hochberg) within its table. Detectable: the true "
        "difference that such a test, uncorrected, would find 4 times in 5. Gain: how far training lowers the "
        "baseline's loss. Equal: the interval, which is not corrected, lies within ±0.01; where the baseline gains "
        "less than 0.01, nothing was learnt that could differ.",
    ]
    for family in FAMILIES:
        lines += ["", f"## {family}", "", f"![Differences with their intervals]({PICTURES[family]})", ""]
        heads = ("model", "task", "baseline", "candidate", "seeds", "difference", "interval", "p", "verdict")
        lines += [_row(*heads, "detectable", "gain", "equal")]
        lines += [_row(*["---"] * 4, *["---:"] * 4, "---", *["---:"] * 2, "---")]
        for row in rows:
            if row.family != family:
                continue
            found = row.found
            interval = f"{signed(found.ci_low)} to {signed(found.ci_high)}"
            p = "–" if found.p_adjusted is None else f"{found.p_adjusted:.2g}"
            detectable = found.smallest_detectable
            cells = [row.model, row.task, *(arm_name(name, row.model) for name in (found.baseline, found.candidate))]
            cells += [str(found.n_seeds), signed(found.difference), interval, p, found.verdict]
            cells += ["–" if detectable is None else f"{detectable:.4f}"]
            cells += ["–" if row.gain is None else f"{row.gain:.3f}".replace("-", "−"), row.equal]
            lines.append(_row(*cells))
    return "\n".join(lines)


def untouched(reports: Reports) -> str:
    """CRReLU minus the untouched model where this is not the baseline."""
    lines = [
        "## CRReLU minus the untouched model",
        "",
        "For a model without GELU. Mean over tokens, seeds that both arms share, Student's interval over the seeds.",
        "",
        _row("model", "task", "difference", "interval", "seeds"),
        _row(*["---"] * 2, *["---:"] * 3),
    ]
    for (model, task), report in reports.items():
        named = {arm.arm: arm for arm in report.arms}
        if report.baseline == "native" or not {"native", "crrelu"} <= set(named):
            continue
        for grid in grids(report):
            native, crrelu = (
                {run.seed: run.metrics["loss"] for run in runs(named[name], grid)} for name in ("native", "crrelu")
            )
            shared = sorted(set(native) & set(crrelu))
            pairs = [native[seed] for seed in shared], [crrelu[seed] for seed in shared]
            found = compare_metric("loss", False, *pairs, "seed", baseline_name="native", candidate_name="crrelu")
            interval = f"{signed(found.ci_low)} to {signed(found.ci_high)}"
            lines.append(_row(model, label(task, grid), signed(found.difference), interval, str(len(shared))))
    return "\n".join(lines)


def fits(reports: Reports) -> str:
    """For each arm with a calibrated activation: how well it fits, and what training does to ε."""
    lines = [
        "## The fit, and ε",
        "",
        "Error: of the MLP's outputs, relative, mean over layers. ε: the layers' means before training, and the "
        "largest change of one of them in any run.",
        "",
        _row("model", "task", "arm", "error", "ε", "largest change"),
        _row(*["---"] * 3, *["---:"] * 3),
    ]
    for (model, task), report in reports.items():
        for arm in report.arms:
            errors = [site["relative_error"] for site in arm.sites if site.get("relative_error") is not None]
            starts = [value for run in arm.runs for value in run.epsilon_start.values() if value is not None]
            if not errors and not starts:
                continue
            span = f"{min(starts):.3g} to {max(starts):.3g}".replace("-", "−") if starts else "–"
            change = max(map(_change, arm.runs), default=0.0)
            error = f"{statistics.fmean(errors):.3f}" if errors else "–"
            lines.append(_row(model, task, arm_name(arm.arm, model), error, span, f"{change:.4f}" if starts else "–"))
    return "\n".join(lines)


def arms(reports: Reports) -> str:
    """For each arm: the loss before and after, the chosen learning rate, time and memory."""
    heads = ("model", "task", "arm", "rate", "loss before", "loss after", "runs", "seconds per run", "peak MiB")
    lines = [
        "## Arms",
        "",
        "Losses here are means over tokens (for DPO over pairs), ± the standard deviation over seeds; the differences "
        "above are means over documents.",
        "",
        _row(*heads),
        _row(*["---"] * 3, *["---:"] * 6),
    ]
    total = tried = 0.0
    untimed = []
    for (model, task), report in reports.items():
        attempts = report.tuning.tries if report.tuning else []
        tried += sum(seconds or 0.0 for entry in attempts for seconds in entry.train_seconds.values())
        untimed += [f"{model}/{task}"] if attempts and not any(entry.train_seconds for entry in attempts) else []
        for arm in report.arms:
            for grid in grids(report):
                planned, done = runs(arm, grid, finished=False), runs(arm, grid)
                if not planned:
                    continue
                tuned = next((entry for entry in attempts if (entry.arm, entry.grid) == (arm.arm, grid)), None)
                rate = (tuned.chosen if tuned and tuned.chosen else {}).get("learning_rate", "–")
                before = _before(arm, grid)
                seconds = [run.train_seconds for run in done if run.train_seconds]
                peak = max((run.peak_memory_bytes or 0 for run in done), default=0)
                total += sum(seconds)
                cells = [model, label(task, grid), arm_name(arm.arm, model)]
                cells += [rate + ("*" if tuned and tuned.at_edge else "")]
                cells += ["–" if before is None else f"{before:.4f}", _spread(_losses(done))]
                cells += [f"{len(done)} of {len(planned)}"]
                cells += [f"{sum(seconds) / len(seconds):.0f}" if seconds else "–", f"{peak / 2**20:.0f}"]
                lines.append(_row(*cells))
    took = f"Training took {total / 3600:.2f} hours, the tries {tried / 3600:.2f}"
    took += f" without those of {', '.join(untimed)}, whose time was not kept" if untimed else ""
    return "\n".join([*lines, "", f"\\* at the edge of the tried values. {took}."])


def tries(reports: Reports) -> str:
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
            lines.append(_row(model, label(task, entry.grid), arm_name(entry.arm, model), " · ".join(cells)))
    return "\n".join(lines)


def missing(reports: Reports) -> str:
    """The comparisons that were not run."""
    left = [f"{model}/{task}" for model in SETTINGS for task in tasks(model) if (model, task) not in reports]
    return f"Not run: {', '.join(left) or 'nothing'}. β of {', '.join(DPO)}: {BETAS.replace(',', ' and ')}."


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _before(arm: Arm, grid: Grid) -> float | None:
    return next((run.before["loss"] for run in runs(arm, grid, finished=False) if run.before), None)


def _losses(done: list[Run]) -> list[float]:
    return [loss for run in done if (loss := run.metrics["loss"]) is not None]


def _change(run: Run) -> float:
    ends = ((run.epsilon_start[path], end) for path, end in run.epsilon.items() if path in run.epsilon_start)
    return max((abs(end - start) for start, end in ends if start is not None and end is not None), default=0.0)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
