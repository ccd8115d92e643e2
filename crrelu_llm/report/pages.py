"""The two kinds of report: one page for training runs, one for the evaluation of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

from crrelu_llm.report import arms, cost, evaluation, tables, trained
from crrelu_llm.report.contents import Verdict, is_evaluation
from crrelu_llm.report.schema import Report
from crrelu_llm.report.tables import Table

_OVER_SEEDS = "Mean ± standard deviation over the finished seeds; peak memory is the largest of them."
_OVER_ITEMS = (
    "In brackets: the 95 % interval over the items of the task, for metrics that are means over items. It is Wilson's "
    "interval for right-or-wrong items, and a bootstrap interval otherwise."
)
_THIS_MACHINE = "They depend on this machine and its other load"
_COST_OF_TRAINING = (
    "Time and tokens/s are means over the finished seeds, peak memory is the largest of them; the ratios are to the "
    f"baseline. {_THIS_MACHINE}; crrelu bench measures speed alone."
)
_COST_OF_EVALUATION = (
    "Time and memory of the finished tasks; the ratios are to the baseline, that of time only for the same number of "
    f"items. {_THIS_MACHINE}."
)


@dataclass(frozen=True)
class Page:
    """The parts that differ between the two kinds of report; each function takes the report.

    Attributes:
        draw: The verdict.
        notes: The caveats beside the verdict.
        overview: What was compared, as name and value.
        arms: What each arm is, in plain words.
        results: Metrics by arm.
        results_hint: How to read the results.
        cost: Time and memory by arm.
        cost_hint: How to read the cost.
    """

    draw: Callable[[Report], Verdict]
    notes: Callable[[Report], list[str]]
    overview: Callable[[Report], list[tuple[str, str]]]
    arms: Callable[[Report], Table]
    results: Callable[[Report], Table]
    results_hint: str
    cost: Callable[[Report], Table]
    cost_hint: str


_TRAINED = Page(
    draw=trained.draw,
    notes=trained.notes,
    overview=tables.overview,
    arms=arms.arms,
    results=tables.results,
    results_hint=_OVER_SEEDS,
    cost=cost.of_training,
    cost_hint=_COST_OF_TRAINING,
)
_EVALUATED = Page(
    draw=evaluation.draw,
    notes=evaluation.notes,
    overview=evaluation.overview,
    arms=lambda report: Table([]),  # the overview names the models
    results=evaluation.results,
    results_hint=_OVER_ITEMS,
    cost=cost.of_evaluation,
    cost_hint=_COST_OF_EVALUATION,
)


def page_of(report: Report) -> Page:
    """The page of a report."""
    return _EVALUATED if is_evaluation(report) else _TRAINED
