"""What a patch does to single modules: activations out of methods, another one at a path, fused forwards."""
