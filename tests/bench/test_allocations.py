import gc

import torch

from crrelu_llm.bench.allocations import peak_memory

CPU = torch.device("cpu")
MEGABYTE = 2**20


def test_the_most_that_is_held_at_once():
    def function():
        first = torch.zeros(MEGABYTE, dtype=torch.uint8)
        del first
        return torch.zeros(3 * MEGABYTE, dtype=torch.uint8), torch.zeros(MEGABYTE, dtype=torch.uint8)

    assert peak_memory(function, CPU) == 4 * MEGABYTE


def test_garbage_of_an_earlier_call_does_not_count():
    """Tensors in a cycle must not be released while the next call is measured: they would lower its peak."""

    class Holder:
        pass

    def leaves_garbage():
        left = Holder()
        left.itself, left.tensor = left, torch.zeros(8 * MEGABYTE, dtype=torch.uint8)

    def function():
        gc.collect()
        return torch.zeros(MEGABYTE, dtype=torch.uint8)

    gc.disable()  # Else it may come by itself between the two.
    try:
        peak_memory(leaves_garbage, CPU)
        assert peak_memory(function, CPU) == MEGABYTE
    finally:
        gc.enable()
