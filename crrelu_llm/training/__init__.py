"""Training: TRL's trainers and recipes, plus what an activation with a learnable ε needs."""
