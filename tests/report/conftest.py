"""Reports whose pictures are drawn but not written, where a test is about something else."""

import pytest

from crrelu_llm.report import differences, plots


@pytest.fixture
def sketched(monkeypatch):
    """Figures are drawn, and not turned into SVG, which takes most of a report's time."""
    for module in (plots, differences):
        monkeypatch.setattr(module, "inline_svg", lambda figure, name: "<svg></svg>")
