"""What is special about the Triton kernels: their machine code, 64-bit offsets, repeatability, and a GPU where there
is one. Their values are compared with the definition in test_backends and test_gated, in Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from kernel_tools import DTYPES, assert_error_is_below_twice, bump, epsilon_of, evaluate, normal

from crrelu_llm import kernels
from crrelu_llm.kernels import eager, reference

pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")
triton = importlib.import_module("crrelu_llm.kernels.triton")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")

# Run by a Python of its own: whether Triton compiles or interprets is settled where a kernel is defined.
_COMPILE = """
import itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from crrelu_llm.kernels import triton as kernels

def ptx(kernel, dtype, constants, arch):
    def kind(name):
        if name.isupper():
            return "constexpr"
        if not name.endswith("pointer"):
            return "i32"
        return "*" + ("fp32" if name[:3] in ("eps", "aff", "par") else dtype)
    signature = {name: kind(name) for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in signature}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if not name.isupper()}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": kernels._WARPS}).asm["ptx"]

found, arch = [], int(sys.argv[1])
for dtype in ("bf16", "fp16", "fp32"):
    for gated, per_channel, affine in itertools.product((False, True), repeat=3):
        if affine and (dtype == "fp16" or arch == 80):
            continue  # the same code as for the others, and compiling takes time
        rows, width = kernels._block(1 << 12 if per_channel else 1, 1 << 13)
        constants = dict(GATED=gated, PER_CHANNEL=per_channel, AFFINE=affine, BLOCK_R=rows, BLOCK_C=width)
        constants["TILES"] = kernels._TILES if per_channel else 1
        for kernel in (kernels._forward, kernels._backward):
            text = ptx(kernel, dtype, constants, arch)
            counts = [text.count(s) for s in ("ld.global", "st.global", "ld.global.v4", "st.global.v4")]
            case = [dtype, gated, per_channel, kernel is kernels._backward]
            found.append([case, counts, ".local" in text])
print(json.dumps(found))
"""


def _expected_transfers(dtype, gated, per_channel, backward):
    """128-bit loads and stores of a thread, at least: 16 elements of each tensor."""
    transfers = 4 if dtype == "fp32" else 2
    loads, stores = 1 + gated + backward, 1 + (gated and backward)
    return loads * transfers, stores * transfers


@pytest.mark.parametrize(("arch", "count"), [(90, 24 + 16), pytest.param(80, 24, marks=pytest.mark.slow)])
def test_the_kernels_load_and_store_128_bits_at_a_time_and_spill_nothing(arch, count):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == count
    for case, counts, local in found:
        loads, stores = _expected_transfers(*case)
        assert counts[2] >= loads, case
        assert counts[3] >= stores, case
        assert not local, case


@on_a_cpu
@pytest.mark.parametrize("packed", [False, True])
def test_rows_may_be_more_than_two_to_the_31_elements_apart(packed):
    """The last row starts at 3·2³⁰: an offset of 32 bits would be negative, and the process would crash."""
    gate, up, epsilon = normal((4, 8), torch.bfloat16), normal((4, 8), torch.bfloat16, seed=1), torch.tensor([0.25])
    # Virtual memory: only the pages that are touched take any.
    both = torch.empty(3 * 2**30 + 16, dtype=torch.bfloat16).as_strided((4, 16), (2**30, 1))
    both.copy_(torch.cat((gate, up), dim=-1))
    far = both.chunk(2, dim=-1)
    torch.testing.assert_close(triton.gated_forward(*far, epsilon), triton.gated_forward(gate, up, epsilon))
    grad = torch.ones_like(gate)
    result = triton.gated_backward(grad, *far, epsilon, packed)
    expected = triton.gated_backward(grad, gate, up, epsilon, packed)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@on_a_cpu
def test_a_tile_may_begin_beyond_two_to_the_31_elements(monkeypatch):
    """Gradients that lie far apart, and tiles of one row each."""
    monkeypatch.setattr(triton, "_TILE", 32)
    x, epsilon = normal((4, 8), torch.bfloat16), epsilon_of(8, torch.float32)
    out = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16).as_strided((4, 8), (2**30, 1))
    total = triton._run_backward(out, None, torch.ones_like(x), x, None, epsilon, None)
    expected = eager.backward(torch.ones_like(x), x, epsilon)
    torch.testing.assert_close((out, total), expected)


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("size", [1, 40], ids=["layer", "channel"])
def test_the_gradient_of_epsilon_has_the_same_bits_each_time(size, monkeypatch):
    if _device() == "cpu":
        monkeypatch.setattr(triton, "_TILE", 64)
    x, epsilon = normal((70, 40), torch.float32).to(_device()), epsilon_of(size, torch.float32).to(_device())
    first, second = (triton.backward(torch.cos(x), x, epsilon)[1] for _ in range(2))
    assert torch.equal(first, second)


def _packed(gate, up, epsilon):
    return kernels.crrelu_packed(torch.cat((gate, up), dim=-1), epsilon)


def _assert_is_the_definition(function, x, up, epsilon):
    gated = function is not kernels.crrelu
    inputs, factor = ((x, up, epsilon), up.double()) if gated else ((x, epsilon), 1)
    grad = torch.cos(3 * x.double()).to(x.dtype)

    def unfused(gate, *rest):
        return reference.crrelu(gate, rest[-1]) * (rest[0] if gated else 1)

    truth = evaluate(unfused, *(t.double() for t in inputs), grad=grad.double())
    plain, result = evaluate(unfused, *inputs, grad=grad), evaluate(function, *inputs, grad=grad)
    if x.dtype == torch.float64:
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
    else:
        summands = (grad.double() * factor * bump(x)).abs().sum(0)
        assert_error_is_below_twice(result, plain, truth, summands if epsilon.numel() > 1 else summands.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [kernels.crrelu, kernels.crrelu_gated, _packed])
def test_values_and_gradients_on_a_gpu(cuda, function, dtype):
    for shape in [(300, 1000), (1, 5000), (5000, 1), (67, 333)]:
        for size in (1, shape[-1]):
            epsilon = epsilon_of(size, torch.promote_types(dtype, torch.float32))
            inputs = normal(shape, dtype, scale=2.5), normal(shape, dtype, seed=1), epsilon
            _assert_is_the_definition(function, *(t.to(cuda) for t in inputs))
