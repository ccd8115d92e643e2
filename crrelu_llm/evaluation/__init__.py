"""Evaluation: metrics of a trained run or of any checkpoint, with a value for every item; suites of tasks."""
