"""What the method says of real models: the density of their pre-activations, and entropies."""
