"""Memory of a training run on paper: from a model's config alone, for each way to spread it over GPUs."""
