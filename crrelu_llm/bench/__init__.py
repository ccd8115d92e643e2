"""Speed and memory of CRReLU against GELU, in one process: measured by `op`, `mlp` and `train`."""
