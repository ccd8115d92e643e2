"""Evaluation: perplexity of a model, and the metrics of a trained run with a value for every item."""
