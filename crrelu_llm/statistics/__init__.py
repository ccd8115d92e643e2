"""Paired statistics: intervals, tests, corrections, and the changes of single items. Needs only numpy and scipy."""
