"""Estimates the memory of a training run from a model's config, for each way to distribute it over GPUs."""
