"""bitsandbytes: 4-bit layers that can be trained on every CPU."""

import contextlib
from collections.abc import Iterator

from crrelu_llm.compat import Private

RELIES_ON = (
    Private(
        "bitsandbytes.nn.modules:has_avx512bf16",
        "QLoRA on a CPU with AVX512-BF16 would lose its gradients silently",
        called_by="bitsandbytes.nn.modules:Linear4bit.__init__",
    ),
)


@contextlib.contextmanager
def trainable_layers() -> Iterator[None]:
    """A context in which new 4-bit layers stay trainable on CPUs with AVX512-BF16.

    There, the first forward pass in evaluation mode repacks the weights for a kernel without a backward pass, and
    gradients are then silently lost.
    """
    from bitsandbytes.nn import modules

    original = modules.has_avx512bf16
    modules.has_avx512bf16 = lambda: False
    try:
        yield
    finally:
        modules.has_avx512bf16 = original
