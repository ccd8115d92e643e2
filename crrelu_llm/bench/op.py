"""`crrelu bench op`: activations and gated products alone, forward, backward and both."""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config  # torch loads it only when it compiles
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from crrelu_llm.bench.accuracy import errors
from crrelu_llm.bench.functions import Function, functions
from crrelu_llm.bench.inputs import constants_of, inputs_of, make_tensors
from crrelu_llm.bench.measure import Candidate, case, measure
from crrelu_llm.kernels import choice

DIRECTIONS = ("forward", "backward", "both")
_BASELINE = {"activation": "gelu", "gated": "geglu"}
# The least number of tensors to read and write: x -> y; x, grad -> grad; and so on.
_TENSORS = {"activation": {"forward": 2, "backward": 3}, "gated": {"forward": 3, "backward": 5}}


def run(
    shapes: list[tuple[int, ...]],
    dtypes: list[str],
    epsilon_per: str,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures every function available on the device.

    Args:
        shapes: Shapes of one input.
        dtypes: Names of torch dtypes.
        epsilon_per: `"layer"` or `"channel"`.
        repeats: How many rounds.
        device: The device of the computation.
        say: Called with progress messages.

    Returns:
        `{cases, errors, left_out}`.
    """
    found, left_out = functions(device)
    cases: list[dict[str, Any]] = []
    # A compiled backward pass can run twice, as here, only if it does not reuse the memory of its inputs.
    with choice.using(None), torch._functorch.config.patch(donated_buffer=False):
        for shape in shapes:
            for dtype in dtypes:
                for kind in _BASELINE:
                    say(f"{'x'.join(map(str, shape))} {dtype} {kind}")
                    chosen = [function for function in found if function.kind == kind]
                    done, missing = _group(chosen, kind, shape, dtype, epsilon_per, repeats, device)
                    cases += done
                    left_out += [entry for entry in missing if entry not in left_out]
        say("errors against float64")
        accuracy = [entry for dtype in dtypes for entry in errors(found, dtype, epsilon_per, device)]
    return {"cases": cases, "errors": accuracy, "left_out": left_out}


def _group(
    found: list[Function],
    kind: str,
    shape: tuple[int, ...],
    dtype: str,
    epsilon_per: str,
    repeats: int,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The cases of one kind, shape and dtype, timed in turns with a copy."""
    tensors = make_tensors(shape, getattr(torch, dtype), epsilon_per, device)
    candidates = [_copy(tensors["grad"], kind)]
    for function in found:
        for direction in DIRECTIONS:
            candidates.append(_candidate(function, direction, tensors))
    measured, left_out = measure(candidates, repeats, device)
    copy = measured[0]
    gelu = {
        entry.candidate.direction: entry
        for entry in measured
        if (entry.candidate.name, entry.candidate.backend) == (_BASELINE[kind], "torch")
    }
    return [case(entry, gelu[entry.candidate.direction], copy, dtype, shape) for entry in measured], left_out


def _copy(tensor: Tensor, kind: str) -> Candidate:
    """Measures the bandwidth of a copy that uses memory as the functions do: into a new tensor each time.

    A copy into an existing tensor would be faster on a CPU, where new memory must be mapped page by page.
    """
    return Candidate("copy", "torch", kind, "forward", tensor.clone, 2 * tensor.nbytes)


def _candidate(function: Function, direction: str, tensors: dict[str, Tensor]) -> Candidate:
    inputs, constants, grad = inputs_of(function, tensors), constants_of(function, tensors), tensors["grad"]
    edge: list[Any] = []

    def forward() -> object:
        function.prepare()
        with torch.no_grad():
            return function.compute(*inputs, *constants)

    def backward() -> object:
        function.prepare()
        if not edge:  # the first run; the result itself need not stay in memory
            edge.append(get_gradient_edge(function.compute(*inputs, *constants)))
        return torch.autograd.grad(edge, inputs, grad, retain_graph=True)

    def both() -> object:
        function.prepare()
        return torch.autograd.grad(function.compute(*inputs, *constants), inputs, grad)

    counts = _TENSORS[function.kind]
    count = sum(counts.values()) if direction == "both" else counts[direction]
    return Candidate(
        function.name,
        function.backend,
        function.kind,
        direction,
        {"forward": forward, "backward": backward, "both": both}[direction],
        count * grad.nbytes,
        lambda: function.failed(grad.device, grad.dtype, grad.numel()),
    )
