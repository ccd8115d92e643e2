"""Trained arms: the verdict in one sentence, and the notes that a sceptical reader needs."""

import statistics

from crrelu_llm.report import text
from crrelu_llm.report.contents import (
    Verdict,
    by_seed,
    candidates,
    describe,
    everything,
    find_arm,
    grids,
    paired_over,
)
from crrelu_llm.report.schema import Arm, Grid, Report
from crrelu_llm.statistics.paired import Comparison, Outcome, smallest_possible_p

# Perplexity is not a mean over documents; if it was not compared by document, its logarithm may have been.
_STAND_IN = {"perplexity": "loss"}
LENGTH = "length_correlation"
AFTER_BEGINNING = "loss_after_beginning"
_LIES_THERE = 0.01  # nats by which the documents' common beginning must change a difference to be named
_FOLLOWS = 0.7  # a rank correlation from which the notes say that the margins follow the length
_ENOUGH = 20  # with fewer pairs, such a correlation may be chance


def draw(report: Report) -> Verdict:
    """The verdict on trained arms.

    The verdict is about the best CRReLU arm, at the grid value where the *baseline* does best (the choice that
    favours the candidate least). It is "better" or "worse" only if the corrected test over seeds and evaluation items
    says so and every seed agrees.
    """
    baseline, metric = report.baseline, report.headline.metric
    label = describe(report, metric).label
    names = candidates(report)
    subject = names[0] if len(names) == 1 else "any arm"
    doubt = f"Whether {subject} is better or worse than {baseline} in {label} cannot be decided, because "
    base = find_arm(report, baseline)
    if base is None:
        return Verdict(doubt + f"the baseline {baseline} is not among the arms.")
    if not any(by_seed(base, grid, metric) for grid in grids(report)):
        return Verdict(doubt + f"no run of the baseline {baseline} gave a {label}.")
    if not names:
        return Verdict(doubt + f"there is no arm besides {baseline}.")
    best = _best_placed(report, base, names, metric)
    if best is None:
        return Verdict(doubt + f"no seed gave a {label} both in {baseline} and in {subject}.")
    name, grid = best
    metric, comparison = _comparison(report, name, grid, metric)
    if comparison is None:
        return Verdict(doubt + f"the report has no comparison of {label}.", candidate=name, grid=grid)
    if comparison.difference is None:
        note = comparison.note or "the difference is not a number"
        return Verdict(doubt + f"{note}.", candidate=name, grid=grid)
    statement, outcome = _statement(report, base, name, grid, comparison, comparison.difference, names)
    return Verdict(statement, outcome, name, grid, comparison, len(paired_seeds(report, base, name, grid, metric)))


def paired_seeds(report: Report, base: Arm, name: str, grid: Grid, metric: str) -> list[float]:
    """Candidate minus baseline for each seed that has both."""
    before, after = by_seed(base, grid, metric), by_seed(find_arm(report, name), grid, metric)
    return [after[seed] - before[seed] for seed in before if seed in after]


def _best_placed(report: Report, base: Arm, names: list[str], metric: str) -> tuple[str, Grid] | None:
    """The best candidate at the baseline's best grid value at which they share a seed."""
    sign = 1 if describe(report, metric).higher_is_better else -1

    def score(arm: Arm | None, grid: Grid) -> float:
        return sign * statistics.fmean(by_seed(arm, grid, metric).values())

    for grid in sorted(
        (grid for grid in grids(report) if by_seed(base, grid, metric)), key=lambda grid: -score(base, grid)
    ):
        paired = [name for name in names if paired_seeds(report, base, name, grid, metric)]
        if paired:
            return max(paired, key=lambda name: score(find_arm(report, name), grid)), grid
    return None


def _comparison(report: Report, name: str, grid: Grid, metric: str) -> tuple[str, Comparison | None]:
    """The comparison of the metric or its stand-in, over seeds and items or else over items; or else over seeds."""
    chosen = [(name, unit) for unit in ("both", "item") for name in (metric, _STAND_IN.get(metric))]
    for wanted, unit in (*chosen, (metric, "seed")):
        for entry in report.comparisons:
            place = (entry.metric, entry.unit, entry.candidate, entry.grid, entry.baseline)
            if place == (wanted, unit, name, grid, report.baseline):
                return entry.metric, entry
    return metric, None


def _statement(
    report: Report, base: Arm, name: str, grid: Grid, comparison: Comparison, difference: float, names: list[str]
) -> tuple[str, Outcome]:
    metric, baseline = comparison.metric, base.arm
    label, pattern = describe(report, metric).label, describe(report, metric).format
    seeds = paired_seeds(report, base, name, grid, metric)
    agree = sum(1 for seed in seeds if seed * difference > 0)
    change = f"{text.size(difference, pattern)} {'higher' if difference > 0 else 'lower'} than"
    if difference == 0:
        change = "the same as"
    who = f"{name}'s {label} is {change} {baseline}'s"
    if len(names) > 1:
        arm = find_arm(report, name)
        kind = "CRReLU arms" if arm and arm.activation == "crrelu" else "arms"
        who = f"the {label} of {name} (the best of {len(names)} {kind}) is {change} that of {baseline}"
    where = f" with {text.grid_label(grid)}, where {baseline} does best" if len(grids(report)) > 1 else ""
    evidence = _perplexities(report, base, name, grid, metric) + _evidence(report, comparison, pattern)
    if len(seeds) < 2:
        return (
            f"Whether {name} is better or worse than {baseline} cannot be decided, because only one seed finished in "
            f"both arms: with this seed{where}, {who} ({evidence}), and another seed may differ.",
            "undecided",
        )
    outcome, reason = _outcome(comparison, agree, len(seeds))
    agreement = f"{agree} of {len(seeds)} seeds agree"
    after = "training" if report.recipe.get("model_config") is not None else "fine-tuning"
    return f"After {after}{where}, {who} ({evidence}; {agreement}): {outcome}{reason}.", outcome


def _outcome(comparison: Comparison, agree: int, seeds: int) -> tuple[Outcome, str]:
    if comparison.note:
        return "undecided", f", because {comparison.note}"
    if comparison.verdict != "undecided" and agree < seeds:
        return "undecided", ", because the seeds disagree"
    if comparison.verdict == "undecided" and comparison.unit == "seed":
        floor = smallest_possible_p(seeds)
        if floor >= 1 - comparison.confidence:
            return "undecided", f", because a test over {seeds} seeds cannot go below p = {text.p_value(floor)}"
    return comparison.verdict, ""


def _perplexities(report: Report, base: Arm, name: str, grid: Grid, metric: str) -> str:
    """The perplexities, for a difference of language-modelling losses: few readers think in nats."""
    after, before = by_seed(find_arm(report, name), grid, "perplexity"), by_seed(base, grid, "perplexity")
    both = after.keys() & before.keys()
    if metric != "loss" or not both:
        return ""
    pattern = describe(report, "perplexity").format
    means = [text.number(statistics.fmean(side[seed] for seed in both), pattern) for side in (after, before)]
    return f"perplexity {means[0]} against {means[1]}; "


def _evidence(report: Report, comparison: Comparison, pattern: str) -> str:
    low, high = comparison.ci_low, comparison.ci_high
    over = f"paired over {paired_over(report, comparison)}"
    if low is None or high is None:
        return over
    if low <= 0 <= high:
        ends = text.interval(low, high, pattern)
    else:
        near, far = sorted((abs(low), abs(high)))
        ends = f"{text.size(near, pattern).removesuffix(' points')} to {text.size(far, pattern)}"
    adjusted = ""
    if comparison.verdict == "undecided" and comparison.unit != "seed":
        adjusted = f", adjusted p = {text.p_value(comparison.p_adjusted)}"
    return f"{comparison.confidence:.0%} interval {ends}, {over}{adjusted}{_detectable(comparison, pattern)}"


def _detectable(comparison: Comparison, pattern: str) -> str:
    smallest, margin = comparison.smallest_detectable, comparison.equivalence_margin
    said = f"; a true difference of {text.size(smallest, pattern)} would be found 4 times in 5" if smallest else ""
    if margin is not None and comparison.verdict == "undecided" and comparison.unit != "item":
        if comparison.equivalent:
            said += f"; differences of more than {text.size(margin, pattern)} are ruled out"
        elif comparison.no_worse:
            said += f"; a result worse by more than {text.size(margin, pattern)} is ruled out"
    return said


def notes(report: Report) -> list[str]:
    """The caveats beside the verdict: few seeds, failed runs, controls."""
    found = []
    seeds = [entry for entry in report.comparisons if entry.unit == "seed" and entry.n > 1]
    if seeds:
        fewest = min(entry.n for entry in seeds)
        floor, confidence = smallest_possible_p(fewest), seeds[0].confidence
        if floor >= 1 - confidence:
            found.append(
                f"With {fewest} seeds, no permutation test over seeds can go below p = {text.p_value(floor)}, and no "
                f"bootstrap interval over seeds can have a confidence above {1 - floor:.0%}. So the intervals over "
                "seeds are Student's, and hold only if the differences are about normal. The rows over "
                f"{report.items} alone are sharper, but apply to these trained models, not to new training runs."
            )
        if fewest == 2:
            found.append(
                "With 2 seeds, the spread between training runs is known only from one difference: the intervals over "
                "seeds are about six times as wide as with many seeds, and their assumption cannot be checked."
            )
    planned = everything(report)
    failed = sum(1 for run in planned if not run.done)
    if failed:
        found.append(
            f"{failed} of {len(planned)} runs did not finish; comparisons use the seeds that finished in both arms."
        )
    found += _of_length(report) + _of_the_beginning(report)
    for metric, description in report.metrics.items():
        if description.reference and metric not in (LENGTH, AFTER_BEGINNING):
            places = [(arm, grid) for arm in report.arms for grid in grids(report)]
            values = [value for arm, grid in places for value in by_seed(arm, grid, metric).values()]
            if values:
                mean = text.number(statistics.fmean(values), description.format)
                found.append(f"For reference: {description.label} is {mean}; it is a control, not a result.")
    return found


def _of_length(report: Report) -> list[str]:
    """Names the arms whose reward margins follow the length of the answers."""
    found: list[str] = []
    if max((entry.n for entry in report.comparisons if entry.unit == "item"), default=0) < _ENOUGH:
        return found
    for grid in grids(report):
        values = {arm.arm: list(by_seed(arm, grid, LENGTH).values()) for arm in report.arms}
        means = {name: statistics.fmean(own) for name, own in values.items() if own}
        said = ", ".join(f"{name} {mean:.2f}".replace("-", "−") for name, mean in means.items())
        high = [name for name, mean in means.items() if abs(mean) >= _FOLLOWS]
        if high:
            where = f" ({text.grid_label(grid)})" if grid else ""
            found.append(
                f"The reward margins of {' and '.join(high)} follow the length of the answers{where}; rank "
                f"correlations: {said}. Such a model may have learnt the length instead of the preference: compare "
                "the reward accuracy with that of “the longer answer wins”."
            )
    return found


def _of_the_beginning(report: Report) -> list[str]:
    """Names the arms whose difference in loss is another one after the tokens with which all documents begin."""
    found: list[str] = []
    base = find_arm(report, report.baseline)
    if base is None:
        return found
    for grid in grids(report):
        for name in (arm.arm for arm in report.arms if arm is not base):
            found_of = [paired_seeds(report, base, name, grid, metric) for metric in ("loss", AFTER_BEGINNING)]
            means = [statistics.fmean(differences) for differences in found_of if differences]
            if len(set(map(len, found_of))) == 1 and means and abs(means[1] - means[0]) >= _LIES_THERE:
                where = f" ({text.grid_label(grid)})" if grid else ""
                whole, after = (text.signed(mean, "{:.4f}") for mean in means)
                found.append(
                    f"All documents begin with the same tokens, such as those of a chat template. {name} minus "
                    f"{base.arm} is {whole} nats a token with them and {after} without them{where}. A loss over the "
                    "answers alone leaves them out: use assistant_only_loss, or rows with prompt and completion."
                )
    return found
