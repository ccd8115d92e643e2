"""What a report says in its own way: one page for training runs, one for checkpoints as they are."""

from collections.abc import Callable
from dataclasses import dataclass

from crrelu_llm.report import arms, cost, evaluation, tables, trained
from crrelu_llm.report.contents import Verdict, is_evaluation
from crrelu_llm.report.schema import Report
from crrelu_llm.report.tables import Table

_OVER_SEEDS = "Mean ± standard deviation over the seeds that finished; peak memory is the largest of them."
_OVER_ITEMS = (
    "In brackets, the 95 % interval over the items of the task, of a metric that is a mean of them: Wilson's of what "
    "is right or wrong, else the bootstrap's."
)
_THIS_MACHINE = "They are those of this machine and of what else it did meanwhile"
_COST_OF_TRAINING = (
    "Time and tokens/s are means over the seeds that finished, peak memory is the largest of them; the ratio is to "
    f"the baseline's. {_THIS_MACHINE}; `crrelu bench` measures speed itself."
)
_COST_OF_EVALUATION = (
    f"Of the tasks that are there; the ratio is to the baseline's, of the same number of items. {_THIS_MACHINE}."
)


@dataclass(frozen=True)
class Page:
    """The parts of a report that differ by what it is of; each takes the report.

    Attributes:
        draw: The verdict.
        notes: What to keep in mind beside it.
        overview: What was compared, as name and value.
        arms: What each arm is, in plain words.
        results: Metrics by arm.
        results_hint: How to read them.
        cost: Time and memory by arm.
        cost_hint: How to read it.
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
