"""Matplotlib figures as inline SVG that follows the page's theme: stand-in colours become CSS variables."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ARM_COLOURS = 8
INK, MUTED, RULE, GOOD, PAPER = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", GOOD: "--good", PAPER: "--paper"}
_VARIABLES |= {f"#0102{slot:02x}": f"--arm-{slot}" for slot in range(ARM_COLOURS)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it has the page's font and can be searched
    "svg.hashsalt": "crrelu",  # otherwise ids would differ between two writes
    "text.parse_math": False,  # a dollar sign in an arm's name is not a formula
    "font.family": "DejaVu Sans",  # ships with matplotlib, and is wider than the page's font, which fits
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def arm_colour(slot: int) -> str:
    """The stand-in colour of an arm."""
    return f"#0102{slot % ARM_COLOURS:02x}"


def css_variable(colour: str) -> str:
    """The CSS variable that a stand-in colour becomes."""
    return _VARIABLES[colour]


@contextmanager
def drawing_style() -> Iterator[None]:
    """A context with the report's drawing style, for drawing and saving."""
    with matplotlib.rc_context(_STYLE):
        yield


def inline_svg(figure: Figure, name: str) -> str:
    """Turns a figure into an SVG element for inlining.

    Args:
        figure: Drawn in the stand-in colours of this module, within `drawing_style`.
        name: Prefix of all ids, unique in the page.

    Returns:
        The `<svg>` element, without size, external references, or ids shared with another figure.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's fonts have it
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    source = buffer.getvalue()
    source = source[source.index("<svg") :]
    source = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", source, flags=re.DOTALL)
    source = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 aria-hidden='true'>", source, count=1)
    source = source.replace("xlink:href=", "href=")
    source = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{name}-\1"', source)
    source = re.sub(r"href=\"#([^\"]+)\"", rf'href="#{name}-\1"', source)
    source = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", source)
    source = re.sub(r"font: ([0-9.]+)px[^;\"]*", r"font-size: \1px", source)
    for colour, variable in _VARIABLES.items():
        source = source.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", source).strip()
