"""Which backend is chosen, why, and what happens where one fails."""

import functools
import logging
import sys
from unittest import mock

import pytest
import torch
from kernel_tools import epsilon_of, evaluate, normal
from torch._dynamo.utils import counters

from crrelu_llm import kernels
from crrelu_llm.errors import InputError
from crrelu_llm.kernels import choice, inductor, reference

CPU = torch.device("cpu")
CHOICES = "auto, reference, eager, inductor or triton"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No choice made, nothing failed and nothing remembered, before and after."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for step in ("before", "after"):
        kernels.set_backend(None)
        choice._module_unavailable.cache_clear()
        choice._module.cache_clear()
        if step == "before":
            yield


@pytest.fixture
def compiler(monkeypatch):
    """As if there were a C++ compiler, where there is none too."""
    monkeypatch.setattr(inductor, "unavailable", lambda device: None)


def _name(device=CPU, dtype=torch.float32, elements=choice.COMPILED_FROM):
    return choice.choose(device, dtype, elements)[0]


def test_large_tensors_of_a_cpu_are_worth_compiling(compiler):
    assert _name(elements=choice.COMPILED_FROM - 1) == "eager"
    assert _name(elements=choice.COMPILED_FROM) == _name(dtype=torch.bfloat16) == "inductor"
    assert _name(dtype=torch.float64) == "eager"


def test_a_gpu_of_any_size_takes_triton(monkeypatch):
    triton = pytest.importorskip("crrelu_llm.kernels.triton")
    monkeypatch.setattr(triton.triton.knobs.runtime, "interpret", False)
    assert _name(torch.device("cuda"), elements=1) == _name(torch.device("xpu")) == "triton"
    assert choice.choose(torch.device("mps"), torch.float32, 1 << 30) == ("eager", "triton: no GPU (mps)")


@pytest.mark.parametrize("name", ["reference", "eager", "inductor"])
def test_a_backend_can_be_chosen_by_call_or_variable(name, compiler, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, name)
    assert choice.choose(CPU, torch.float64, 1) == (name, "chosen by the user")
    monkeypatch.delenv(choice.VARIABLE)
    kernels.set_backend(name)
    assert choice.choose(CPU, torch.float64, 1) == (name, "chosen by the user")


def test_the_call_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "reference")
    kernels.set_backend("eager")
    assert choice.forced() == "eager"
    kernels.set_backend("auto")
    assert choice.forced() is None
    kernels.set_backend(None)
    assert choice.forced() == "reference"


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_empty_variable_and_auto_choose_nothing(value, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, value)
    assert choice.forced() is None


def test_unknown_names_are_refused_with_the_choices(monkeypatch):
    with pytest.raises(InputError, match=f"^set_backend: unknown backend 'cuda'; choose {CHOICES}$"):
        kernels.set_backend("cuda")
    assert choice.forced() is None
    monkeypatch.setenv(choice.VARIABLE, "Triton")
    with pytest.raises(InputError, match=f"^CRRELU_BACKEND: unknown backend 'Triton'; choose {CHOICES}$"):
        kernels.crrelu(torch.ones(2), torch.ones(1))


def test_the_chosen_backend_is_the_one_that_computes(compiler, monkeypatch):
    kernels.set_backend("inductor")
    monkeypatch.setattr(inductor, "forward", lambda x, epsilon, affine=None: x + 100)
    assert kernels.crrelu(torch.ones(2), torch.ones(1)).tolist() == [101.0, 101.0]


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_a_failing_backend_is_left_for_eager_with_one_warning(function, compiler, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(inductor, function, fail)
    kernels.set_backend("inductor")
    x, epsilon = normal((4, 6)), epsilon_of(6)
    expected = evaluate(reference.crrelu, x, epsilon, grad=torch.cos(x))
    with caplog.at_level(logging.WARNING, "crrelu_llm"):
        for _ in range(2):
            torch.testing.assert_close(evaluate(kernels.crrelu, x, epsilon, grad=torch.cos(x)), expected)
    warnings = [record.getMessage() for record in caplog.records if record.name == "crrelu_llm"]
    assert warnings == [
        "crrelu: the inductor backend failed, from now on eager is used (RuntimeError: first line second line)"
    ]
    reason = "inductor was chosen, but it failed: RuntimeError: first line second line"
    assert choice.choose(CPU, x.dtype, 24) == ("eager", reason)
    kernels.set_backend("inductor")
    assert _name() == "inductor"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_no_reason_to_fall_back(error, compiler, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(inductor, "forward", fail)
    kernels.set_backend("inductor")
    with pytest.raises(type(error), match="memory"):
        kernels.crrelu(torch.ones(2), torch.ones(1))
    assert _name() == "inductor"


def test_input_that_no_backend_can_take_is_no_reason_to_fall_back(compiler):
    kernels.set_backend("inductor")
    with pytest.raises(RuntimeError):
        kernels.crrelu(torch.ones(4, 6), torch.ones(5))
    assert _name() == "inductor"


def test_a_chosen_backend_that_a_device_lacks_is_said_once(compiler, monkeypatch, caplog):
    choice._warn.cache_clear()
    monkeypatch.setattr(choice, "_unavailable", lambda name, device: "no GPU" if name == "triton" else None)
    kernels.set_backend("triton")
    with caplog.at_level(logging.WARNING, "crrelu_llm"):
        for _ in range(2):
            kernels.crrelu(torch.ones(2), torch.ones(1))
    messages = [record.getMessage() for record in caplog.records if record.name == "crrelu_llm"]
    assert messages == ["crrelu: triton was chosen, but no GPU; eager is used"]


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        (lambda: mock.patch("shutil.which", return_value=None), "no C++ compiler"),
        (
            lambda: mock.patch("torch._inductor.cpp_builder.get_cpp_compiler", side_effect=RuntimeError("not\nfound")),
            "no C++ compiler (not found)",
        ),
        (lambda: torch._dynamo.config.patch(disable=True), "torch.compile is disabled (TORCHDYNAMO_DISABLE)"),
    ],
    ids=["missing", "broken", "disabled"],
)
def test_without_a_compiler_eager_computes_and_says_why(without, reason):
    x, epsilon = normal((4, 6)), epsilon_of(6)
    with without():
        assert choice.choose(CPU, torch.float32, choice.COMPILED_FROM) == ("eager", f"inductor: {reason}")
        kernels.set_backend("inductor")
        assert choice.choose(CPU, torch.float32, 1) == ("eager", f"inductor was chosen, but {reason}")
        torch.testing.assert_close(kernels.crrelu(x, epsilon), reference.crrelu(x, epsilon))


def test_without_triton_eager_computes_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "crrelu_llm.kernels.triton", raising=False)
    name, reason = choice.choose(torch.device("cuda"), torch.float32, 1)
    assert name == "eager"
    assert reason.startswith("triton: ") and "\n" not in reason


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 96], ids=["layer", "channel"])
def test_training_and_evaluation_compile_each_loop_once(size, monkeypatch):
    """Whatever the number of rows, with and without gradients."""
    kernels.set_backend("inductor")
    if (reason := choice.choose(CPU, torch.float32, 1)[1]) != "chosen by the user":
        pytest.skip(reason)
    compiled = functools.cache(inductor._compiled.__wrapped__)
    monkeypatch.setattr(inductor, "_compiled", compiled)
    counters.clear()
    epsilon = torch.full((size,), 0.25, requires_grad=True)

    def step(rows):
        x, gate_up = torch.ones(rows, 96, requires_grad=True), torch.ones(rows, 192, requires_grad=True)
        return kernels.crrelu(x, epsilon).sum() + kernels.crrelu_packed(gate_up, epsilon).sum()

    for rows in (64, 100, 403):
        step(rows).backward()
        with torch.no_grad():
            step(rows + 13)
    assert compiled.cache_info().currsize == 4
    assert counters["stats"]["unique_graphs"] == 4
    assert choice._failed == {}
