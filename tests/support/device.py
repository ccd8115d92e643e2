"""Whether there is a GPU, found out without torch, whose import may already settle what Triton does."""

import ctypes


def has_gpu():
    """Whether the driver gives this process a CUDA device."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False
