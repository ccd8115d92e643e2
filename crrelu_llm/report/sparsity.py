"""The report's table and figure of sparsity: the share of exact zeros after the activation of each layer."""

import statistics

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from crrelu_llm.report import text
from crrelu_llm.report.contents import everything, grids, is_evaluation, runs
from crrelu_llm.report.drawing import Key, Picture, arm_key, line_style, new_axes
from crrelu_llm.report.schema import Arm, Grid, Report
from crrelu_llm.report.svg import PAPER, inline_svg
from crrelu_llm.report.tables import Cell, Table

_WORTH = 0.01  # the smallest share of zeros that is worth reporting
_FORMAT = "{:.1%}"


def table(report: Report) -> Table:
    """A row for each layer, after rows for all layers, and a column for each arm (and grid value).

    There are no rows if no arm is sparse.
    """
    if not _is_worth_it(report):
        return Table([])
    places = [(arm, grid) for arm in report.arms for grid in grids(report) if _layers(arm, grid)]
    names = [", ".join(filter(None, (arm.arm, text.grid_label(grid)))) for arm, grid in places]
    made = Table(["layer", *names])
    if any(_layers(arm, grid, before=True) for arm, grid in places):
        made.rows.append([Cell("all, before"), *(Cell(_mean(arm, grid, before=True)) for arm, grid in places)])
    made.rows.append([Cell("all"), *(Cell(_mean(arm, grid)) for arm, grid in places)])
    columns = [(_layers(arm, grid), _layers(arm, grid, at_offset=True)) for arm, grid in places]
    for layer in sorted({layer for zeros, _ in columns for layer in zeros}):
        row = [Cell(_share(zeros.get(layer), offset.get(layer))) for zeros, offset in columns]
        made.rows.append([Cell(str(layer)), *row])
    return made


def hint(report: Report) -> list[str]:
    """Explains the shares, and what they mean for calibrated arms and for CRReLU."""
    values, evaluated = grids(report), is_evaluation(report)
    tokens = max((run.sparsity.tokens for run in everything(report) if run.done), default=0)
    said = [
        f"The share of exact zeros in the output of each layer's activation, on {tokens} tokens of the "
        f"{'text' if evaluated else 'evaluation data; mean over the finished seeds'}. In a gated MLP, this is the "
        "output before the product with the other projection."
    ]
    if any(_worth(arm, grid, at_offset=True) for arm in report.arms for grid in values):
        said.append(
            "A calibrated activation computes gain·f(scale·(x + shift)) + offset: where f is 0, it gives the offset "
            "of its channel, which a matrix product cannot skip. In brackets: the share of values that equal their "
            "offset; with calibration=none they would be 0."
        )
    own = [f"{arm.arm} {_mean(arm, values[0])}" for arm in report.arms if arm.activation == "crrelu"]
    if own:
        said.append(
            f"CRReLU itself is not sparse ({'; '.join(own)}): below 0 it is ε·x·exp(−x²/2), which is 0 only where "
            "it underflows (in float32, for x below about −14)."
        )
    return said


def picture(report: Report, grid: Grid) -> Picture | None:
    """One line for each arm over the layers, at a grid value."""
    if not _is_worth_it(report):
        return None
    figure, axes = new_axes(3.0)
    drawn, hollow = [], False
    for arm in report.arms:
        zeros, offset = _layers(arm, grid), _layers(arm, grid, at_offset=True)
        if not zeros:
            continue
        style = line_style(report, arm.arm)
        axes.plot(list(zeros), list(zeros.values()), marker="o", markersize=4, **style)
        if _worth(arm, grid, at_offset=True):
            hollow = True
            marks = {"markerfacecolor": PAPER, "markersize": 4.5, "markeredgewidth": 1.2}
            axes.plot(list(offset), list(offset.values()), "o", color=style["color"], **marks)
        drawn.append(arm.arm)
    if not drawn:
        return None
    axes.set(xlabel="layer", ylabel="share of exact zeros")
    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 0.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    at = f" at {text.grid_label(grid)}" if grid else ""
    keys = [arm_key(report, name) for name in drawn]
    return Picture(
        "sparsity",
        "Zeros after the activation of each layer",
        "" if is_evaluation(report) else f"After training, mean over seeds{at}.",
        f"Share of exact zeros by layer for {', '.join(drawn)}.",
        inline_svg(figure, "sparsity"),
        [*keys, Key("at its offset", "--muted", mark="ring")] if hollow else keys,
    )


def _is_worth_it(report: Report) -> bool:
    places = [(arm, grid) for arm in report.arms for grid in grids(report)]
    return any(_worth(arm, grid, at_offset) for arm, grid in places for at_offset in (False, True))


def _worth(arm: Arm, grid: Grid, at_offset: bool) -> bool:
    found = [_layers(arm, grid, at_offset, before) for before in (False, True)]
    return any(np.mean(list(layers.values())) >= _WORTH for layers in found if layers)


def _layers(arm: Arm, grid: Grid, at_offset: bool = False, before: bool = False) -> dict[int, float]:
    """The share of zeros, or of values equal to their offset, after or before training.

    By layer number, averaged over seeds and over the sites of a layer.
    """
    values: dict[int, list[float]] = {}
    for run in runs(arm, grid):
        found = run.sparsity_before if before else run.sparsity
        for path, share in (found.at_offset if at_offset else found.zeros).items():
            layer = next((int(part) for part in path.split(".") if part.isdigit()), 0)
            values.setdefault(layer, []).append(share)
    return {layer: statistics.fmean(values[layer]) for layer in sorted(values)}


def _mean(arm: Arm, grid: Grid, before: bool = False) -> str:
    zeros, offset = (list(_layers(arm, grid, at_offset, before).values()) for at_offset in (False, True))
    return _share(statistics.fmean(zeros) if zeros else None, statistics.fmean(offset) if offset else None)


def _share(zeros: float | None, offset: float | None) -> str:
    bracket = "" if offset is None else f" ({text.number(offset, _FORMAT)})"
    return text.number(zeros, _FORMAT) + bracket
