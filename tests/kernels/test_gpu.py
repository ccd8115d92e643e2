"""What only a GPU can show: values against float64, strides, offsets beyond 2³¹, streams, CUDA graphs, compilers.

All of it is skipped where there is no GPU; `eval/gpu/run.sh` runs it on one.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_tools import DTYPES, epsilon_of, evaluate, normal
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from crrelu_llm import CRReLU, kernels, patch
from crrelu_llm.kernels import reference
from crrelu_llm.kernels.choice import using

pytestmark = pytest.mark.gpu
GIB = 2**30


def _packed(gate, up, *rest):
    return kernels.crrelu_packed(torch.cat((gate, up), dim=-1), *rest)


def _affine(channels):
    """Scales and gains of both signs, multiples of 1/8: exact in every dtype."""
    steps = torch.arange(channels)
    scale, gain = (steps % 3 * 2 - 1.5) / 2, (steps % 4 * 3 - 4) / 8
    return torch.stack([scale, (steps % 5 - 2) / 4, gain, (steps % 7 - 3) / 8]).float()


def _assert_rounded_once(result, exact, dtype):
    """Value and gradients but ε's: float32 (float64) arithmetic, and one rounding to the dtype."""
    for ours, theirs in zip(result, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps + 1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [kernels.crrelu, kernels.crrelu_gated, _packed])
def test_calibrated_values_and_gradients_are_those_of_float64(cuda, function, dtype):
    gated = function is not kernels.crrelu
    for shape in [(300, 1000), (1, 5000), (67, 333)]:
        affine = _affine(shape[-1]).to(cuda)
        gate, up = (normal(shape, dtype, seed=seed).to(cuda) for seed in (0, 1))
        for size in (1, shape[-1]):
            wide = torch.promote_types(dtype, torch.float32)
            inputs = (gate, *([up] if gated else []), epsilon_of(size, wide).to(cuda))
            grad = torch.cos(3 * gate.double()).to(dtype)

            def exact(x, *rest, gated=gated, affine=affine):
                return reference.crrelu(x, rest[-1], affine.double()) * (rest[0] if gated else 1)

            def call(*inputs, affine=affine):
                return function(*inputs, affine)

            *expected, total = evaluate(exact, *(t.double() for t in inputs), grad=grad.double())
            *result, our_total = evaluate(call, *inputs, grad=grad)
            _assert_rounded_once(result, expected, dtype)
            # ε's is a sum, of summands that are below 0.61 · |gain| · |grad| · |up|.
            summands = 0.61 * (affine[2].double() * grad.double() * (up.double() if gated else 1)).abs().sum(0)
            bound = 1e-5 * (summands if size > 1 else summands.sum()) + 1e-12
            assert ((our_total.double() - total).abs() <= bound).all()


@pytest.mark.parametrize("size", [1, 96], ids=["layer", "channel"])
@pytest.mark.parametrize("layout", ["halves", "one half and its own", "transposed", "every other", "three dimensions"])
def test_gate_up_and_gradient_may_have_strides_of_their_own(cuda, layout, size):
    """The same numbers as from tensors that lie in one piece, whatever the strides of its peers are."""
    gate, up = (normal((130, 96), torch.bfloat16, seed=seed).to(cuda) for seed in (0, 1))
    epsilon, grad = epsilon_of(size, torch.float32).to(cuda), torch.cos(gate)
    expected = evaluate(kernels.crrelu_gated, gate, up, epsilon, grad=grad)
    if layout == "halves":
        gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    elif layout == "one half and its own":
        gate, grad = torch.cat((gate, gate), dim=-1).chunk(2, dim=-1)[1], torch.cat((grad, grad), dim=-1)[:, :96]
    elif layout == "transposed":
        gate, up = gate.t().contiguous().t(), up
    elif layout == "every other":
        up = torch.stack((up, up), dim=-1)[..., 0]
    else:
        gate, up, grad = (t.view(13, 10, 96).transpose(0, 1).contiguous().transpose(0, 1) for t in (gate, up, grad))
    assert not (gate.is_contiguous() and up.is_contiguous() and grad.is_contiguous())
    result = evaluate(kernels.crrelu_gated, gate, up, epsilon, grad=grad)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-4)


def _poisoned(numel, dtype, device):
    """Leaves memory of this size behind that is full of NaN, for the allocator to give to what comes next."""
    poison = torch.full((numel,), torch.nan, dtype=dtype, device=device)
    del poison


def _require_memory(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory; {free:.0f} GiB are free")


def _check_elementwise(device, numel, tail):
    """All zeros but a tail of positive numbers: f(0) = 0, f'(0) = ε, and the tail alone counts in ε's gradient."""
    from crrelu_llm.kernels import triton

    epsilon = torch.tensor([0.25], device=device)
    end = normal((1, tail), torch.bfloat16).abs().to(device)
    x = torch.zeros(1, numel, dtype=torch.bfloat16, device=device)
    x[:, -tail:] = end
    _poisoned(numel, torch.bfloat16, device)
    y = triton.forward(x, epsilon)
    assert torch.equal(y[:, -tail:], triton.forward(end.contiguous(), epsilon))
    assert int(torch.count_nonzero(y[:, :-tail])) == 0
    grad = torch.ones_like(y)
    del y
    _poisoned(numel, torch.bfloat16, device)
    grad_x, total = triton.backward(grad, x, epsilon)
    expected, its_total = triton.backward(torch.ones_like(end), end.contiguous(), epsilon)
    assert torch.equal(grad_x[:, -tail:], expected)
    assert bool((grad_x[:, :-tail] == 0.25).all())
    torch.testing.assert_close(total, its_total, rtol=1e-5, atol=0.0)


def test_more_than_two_to_the_31_elements(cuda):
    _require_memory(24)
    _check_elementwise(cuda, 2**31 + 2**16, 2**16)


def _check_packed(device, rows, columns, tail):
    """Zeros but for the last rows, one ε a channel."""
    from crrelu_llm.kernels import triton

    epsilon = epsilon_of(columns, torch.float32).to(device)
    end = normal((tail, 2 * columns), torch.bfloat16).to(device)
    whole = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16, device=device)
    whole[-tail:] = end
    _poisoned(rows * columns, torch.bfloat16, device)
    y = triton.gated_forward(*whole.chunk(2, dim=-1), epsilon)
    assert torch.equal(y[-tail:], triton.gated_forward(*end.chunk(2, dim=-1), epsilon))
    assert int(torch.count_nonzero(y[:-tail])) == 0
    grad = torch.ones_like(y)
    del y
    _poisoned(2 * rows * columns, torch.bfloat16, device)
    both, _, total = triton.gated_backward(grad, *whole.chunk(2, dim=-1), epsilon, True)
    expected, _, its_total = triton.gated_backward(grad[-tail:], *end.chunk(2, dim=-1), epsilon, True)
    assert torch.equal(both[-tail:], expected)
    assert int(torch.count_nonzero(both[:-tail])) == 0
    torch.testing.assert_close(total, its_total, rtol=1e-5, atol=1e-5)


def test_rows_that_begin_beyond_two_to_the_31_elements(cuda):
    _require_memory(20)
    _check_packed(cuda, 2**18 + 3, 4096, 5)


def test_a_side_stream_waits_for_its_own_work_only(cuda):
    x, epsilon = normal((512, 2048), torch.bfloat16).to(cuda), epsilon_of(1, torch.float32).to(cuda)
    expected = kernels.crrelu(x, epsilon)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x
        for _ in range(200):  # still running when the kernel is launched
            late = late.clone()
        y = kernels.crrelu(late, epsilon)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_cuda_graph_replays_forward_and_backward(cuda, calibrated):
    module = CRReLU(96, 0.25, calibrated=96 if calibrated else None).to(cuda)
    gate, up, grad = (normal((130, 96), torch.bfloat16, seed=seed).to(cuda) for seed in range(3))
    static = [gate.clone().requires_grad_(), up.clone().requires_grad_()]

    def step():
        y = module(*static)
        return (y.detach(), *torch.autograd.grad(y, (*static, module.epsilon), grad))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (5, 6):
        fresh = [normal((130, 96), torch.bfloat16, seed=seed + part).to(cuda) for part in (0, 10)]
        with torch.no_grad():
            for place, values in zip(static, fresh, strict=True):
                place.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        found = [tensor.clone() for tensor in results]
        torch.testing.assert_close(found, list(step()), rtol=0, atol=0)


# A Python of its own: a capture that fails leaves the process with a broken CUDA context.
_CAPTURE = """
import torch
from crrelu_llm import kernels
from crrelu_llm.kernels import choice
kernels.set_backend("triton")
x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
epsilon = torch.tensor([0.25], device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph), torch.no_grad():
    y = kernels.crrelu(x, epsilon)
graph.replay()
torch.cuda.synchronize()
assert not choice._failed, choice._failed
wide = x.double()
exact = torch.relu(wide) + 0.25 * wide * torch.exp(-wide * wide / 2)
torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=1e-5)
print("captured")
"""


def test_a_cuda_graph_may_be_captured_from_the_first_call_on(cuda, tmp_path):
    """No kernel is compiled, loaded or timed before: the caches are empty."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _CAPTURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "captured" in done.stdout


class _MLP(nn.Module):
    """A gated MLP with one ε a channel and a plain one with a single ε, one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(64, 160), nn.Linear(64, 160), nn.Linear(160, 64)
        self.gated_act, self.act = CRReLU(160, 0.25), CRReLU(None, 0.25)

    def forward(self, x):
        return self.act(self.down(self.gated_act(self.gate(x), self.up(x))))


def _gradients(mlp, forward, x):
    mlp.zero_grad()
    forward(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in mlp.parameters()]


def test_a_compiled_mlp_is_one_graph_with_the_same_gradients(cuda):
    mlp, x = _MLP().to(cuda), normal((128, 64), torch.float32).to(cuda)
    expected = _gradients(mlp, mlp, x)
    torch.testing.assert_close(_gradients(mlp, torch.compile(mlp, fullgraph=True), x), expected, rtol=1e-3, atol=1e-5)


def test_a_compiled_mlp_under_cuda_graphs(cuda):
    mlp = _MLP().to(cuda).eval()
    compiled = torch.compile(mlp, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):  # warm-up, capture, replays
            x = normal((128, 64), torch.float32, seed=seed).to(cuda)
            torch.testing.assert_close(compiled(x).clone(), mlp(x), rtol=1e-3, atol=1e-5)


def test_the_operator_itself_compiles(cuda):
    """Not the plain formula, which `kernels` gives a compiler, but the kernel within a compiled graph."""
    x, epsilon = normal((64, 96), torch.float32).to(cuda), epsilon_of(96, torch.float32).to(cuda)

    def function(x, epsilon):
        return torch.ops.crrelu_llm.crrelu(x, epsilon).sin()

    expected = evaluate(function, x, epsilon, grad=torch.cos(x))
    result = evaluate(torch.compile(function, fullgraph=True), x, epsilon, grad=torch.cos(x))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_patched_model_trains_as_on_the_cpu(cuda, family):
    """Losses of three steps, ε among what is trained."""

    def losses(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, attn_implementation="eager")).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        patch(model, "crrelu", epsilon_per="channel", epsilon_init=0.25, calibration="none")
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1)).to(device)
        found = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        epsilons = [parameter.detach().cpu() for name, parameter in model.named_parameters() if "epsilon" in name]
        return torch.tensor(found), torch.cat(epsilons)

    with using("reference"):
        expected, their_epsilon = losses("cpu")
    with using("triton"):
        found, epsilon = losses(cuda)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(epsilon, their_epsilon, rtol=1e-3, atol=1e-5)
