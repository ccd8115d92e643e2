"""Studies: what the entropy method predicts, and what ε does, judged by comparisons of trained models."""
