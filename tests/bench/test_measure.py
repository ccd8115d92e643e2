"""How bench measures: times in turns, exact and repeatable memory, ratios; whatever the machine's speed."""

import pytest
import torch

from crrelu_llm.bench import timing
from crrelu_llm.bench.allocations import peak_memory
from crrelu_llm.bench.measure import Candidate, Measured, case, measure
from crrelu_llm.bench.timing import Timing, interleaved
from crrelu_llm.bench.train import tokens_per_second

CPU = torch.device("cpu")


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0)


def test_functions_are_timed_in_turns(monkeypatch):
    """Each function once a round, called as often as its speed asks for."""
    asked = []

    def sample(function, calls, device):
        asked.append((function.__name__, calls))
        return function()

    def fast():
        return 0.5

    def slow():
        return 30.0

    monkeypatch.setattr(timing, "sample", sample)
    assert interleaved([fast, slow], 8, CPU) == [Timing(0.5, 0.5, 0.5), Timing(30.0, 30.0, 30.0)]
    assert asked[:2] == [("fast", 1), ("slow", 1)]
    rounds = [asked[start : start + 2] for start in range(2, len(asked), 2)]
    assert len(rounds) == 8
    assert all(sorted(entry) == [("fast", 4), ("slow", 1)] for entry in rounds)
    assert len({tuple(entry) for entry in rounds}) == 2  # in either order


def allocate():
    first = torch.empty(1000, dtype=torch.float32)
    second = torch.empty(500, dtype=torch.float64)
    del first
    third = torch.empty(300, dtype=torch.uint8)
    return second, third


def test_peak_memory_is_exact_and_the_same_each_time():
    assert [peak_memory(allocate, CPU) for _ in range(3)] == [8000, 8000, 8000]


def test_peak_memory_is_above_the_start_and_sees_inside_an_operator():
    x, held = torch.ones(1 << 16), torch.ones(1 << 20)
    from crrelu_llm import kernels

    epsilon = torch.tensor([0.01])
    with kernels.choice.using("eager"):
        peak = peak_memory(lambda: kernels.crrelu(x, epsilon), CPU)
    # The result and three buffers of the same size; a few bytes for constants.
    assert 4 * x.nbytes <= peak < 4 * x.nbytes + 256
    assert held.numel() == 1 << 20


def test_the_profiler_says_nothing(capfd):
    peak_memory(allocate, CPU)
    assert capfd.readouterr() == ("", "")


def fake(name, milliseconds, traffic=None):
    about = Candidate(name, "torch", "activation", "forward", lambda: None, traffic)
    return Measured(about, Timing(milliseconds, milliseconds / 2, 2 * milliseconds), 77)


def test_a_case_divides_rightly():
    entry = case(fake("x", 3.0, 6_000_000), fake("gelu", 2.0), fake("copy", 4.0, 32_000_000), "float32", (2, 5))
    assert entry == {
        "name": "x",
        "backend": "torch",
        "kind": "activation",
        "dtype": "float32",
        "shape": [2, 5],
        "direction": "forward",
        "milliseconds": 3.0,
        "milliseconds_low": 1.5,
        "milliseconds_high": 6.0,
        "ratio_to_gelu": 1.5,
        "gigabytes_per_second": 2.0,
        "copy_gigabytes_per_second": 8.0,
        "fraction_of_copy_bandwidth": 0.25,
        "peak_memory_bytes": 77,
    }
    without = case(fake("x", 3.0), fake("gelu", 2.0), None, "float32", (2, 5))
    assert without["gigabytes_per_second"] is without["fraction_of_copy_bandwidth"] is None
    assert tokens_per_second({"shape": [4, 100], "milliseconds": 500.0}) == 800


def fails():
    raise ValueError("no\nway")


def test_what_fails_is_left_out_with_the_reason():
    good = Candidate("gelu", "torch", "activation", "forward", allocate)
    broken = Candidate("crrelu", "inductor", "activation", "forward", fails)
    replaced = Candidate("crrelu", "triton", "activation", "both", allocate, failed=lambda: "eager ran instead")
    measured, left_out = measure([good, broken, replaced], 1, CPU)
    assert [entry.candidate for entry in measured] == [good]
    assert left_out == [
        {"name": "crrelu", "backend": "inductor", "direction": "forward", "reason": "ValueError: no way"},
        {"name": "crrelu", "backend": "triton", "direction": "both", "reason": "eager ran instead"},
    ]


def test_torch_itself_may_not_fail():
    with pytest.raises(ValueError, match="way"):
        measure([Candidate("gelu", "torch", "activation", "forward", fails)], 1, CPU)


def test_a_backend_that_another_has_replaced_is_not_timed_under_its_name(monkeypatch):
    """Each run sets the backend again, and must not forget by that that it has failed."""
    from crrelu_llm import kernels
    from crrelu_llm.bench.functions import Function
    from crrelu_llm.kernels import choice, formula

    def fail(*args):
        raise RuntimeError("broken")

    inductor = pytest.importorskip("crrelu_llm.kernels.inductor")
    monkeypatch.setattr(inductor, "unavailable", lambda device: None)
    monkeypatch.setattr(inductor, "forward", fail)
    function = Function(
        "crrelu", "inductor", "activation", ("x", "epsilon"), kernels.crrelu, formula.crrelu, forced="inductor"
    )
    x, epsilon = torch.ones(4, 4), torch.tensor([0.25])
    with choice.using(None):
        for _ in range(2):
            function.prepare()
            function.compute(x.requires_grad_(), epsilon)
        assert "broken" in function.failed(CPU, torch.float32, x.numel())
