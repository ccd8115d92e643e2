"""Paired statistics: intervals, tests, corrections, and what happened to single items. numpy and scipy alone."""
