"""Shared by all figures of the report: the size, the legends, and the style of each arm."""

from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crrelu_llm.report.schema import Report
from crrelu_llm.report.svg import arm_colour, css_variable
from crrelu_llm.report.tables import arm_slot

WIDTH = 5.0  # inches: small enough for text to stay readable when a phone shrinks it
_DASHES = ("", "5 1.8", "1.6 1.4", "6 1.8 1.6 1.8", "9 2.5", "3 1.2", "8 1.6 1.6 1.6 1.6 1.6", "2.6 2.6")


@dataclass
class Key:
    """One entry of a legend: a line (with its dash, in line widths) or a mark, in a colour of the page."""

    label: str
    colour: str
    dash: str = ""
    mark: str = "line"


@dataclass
class Picture:
    """A figure of the report: the SVG, a title, a caption, a description in words, and the legend."""

    name: str
    title: str
    caption: str
    description: str
    svg: str
    keys: list[Key] = field(default_factory=list)


def arm_key(report: Report, name: str) -> Key:
    """The legend entry of an arm: the same colour and dash everywhere."""
    slot = arm_slot(report, name) or 0
    return Key(name, css_variable(arm_colour(slot)), _DASHES[slot % len(_DASHES)])


def line_style(report: Report, name: str) -> dict[str, Any]:
    """Colour and dash of an arm's lines, as matplotlib takes them."""
    slot = arm_slot(report, name) or 0
    dash = _DASHES[slot % len(_DASHES)]
    return {"color": arm_colour(slot), "linestyle": (0, tuple(map(float, dash.split()))) if dash else "-"}


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()
