"""Speed and memory of CRReLU against GELU, in one process: `op`, `mlp` and `train` measure, the others help."""
