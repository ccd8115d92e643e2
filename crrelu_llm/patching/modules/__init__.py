"""Changes to single modules: exposing hidden activations, replacing the activation at a path, fusing forwards."""
