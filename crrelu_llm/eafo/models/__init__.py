"""The method on real models: the density of their pre-activations, entropies, and the effect of ε."""
