"""`crrelu bench mlp`: the training step of a stack of MLPs, plain (GPT-2's) and gated (Llama's)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.bench.measure import Candidate, case, measure
from crrelu_llm.bench.patches import GELU, Arm, arms, backend_of

KINDS = ("plain", "gated")


def run(
    layers: int,
    hidden: int,
    width: int,
    tokens: int,
    dtypes: list[str],
    epsilon_per: str,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures forward and backward passes, including the gradients of weights and input.

    Args:
        layers: How many MLPs to stack.
        hidden: Size of the input and output.
        width: Size of the activation.
        tokens: Rows of the input.
        dtypes: Names of torch dtypes.
        epsilon_per: `"layer"` or `"channel"`.
        repeats: How many rounds.
        device: The device of the computation.
        say: Called with progress messages.

    Returns:
        `{cases, left_out}`; a case's shape is `(layers, tokens, hidden, width)`.
    """
    cases: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for dtype in dtypes:
        for kind in KINDS:
            say(f"{layers} of {hidden}x{width}, {tokens} tokens, {dtype} {kind}")
            data = torch.randn(2, tokens, hidden, generator=torch.Generator().manual_seed(0))
            x, grad = data.to(device=device, dtype=getattr(torch, dtype)).unbind()
            candidates = []
            for name, arm in arms(epsilon_per).items():
                module = build_mlps(kind, layers, hidden, width, arm).to(device)
                _cast(module, getattr(torch, dtype))
                candidates.append(Candidate(name, backend_of(name), kind, "both", _step(module, x, grad)))
            measured, missing = measure(candidates, repeats, device)
            gelu = next(entry for entry in measured if entry.candidate.name == GELU)
            cases += [case(entry, gelu, None, dtype, (layers, tokens, hidden, width)) for entry in measured]
            left_out += missing
    return {"cases": cases, "left_out": left_out}


def build_mlps(kind: str, layers: int, hidden: int, width: int, arm: Arm) -> nn.Module:
    """A stack of a model's MLPs, patched or not, in float32, always with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "plain":
        sizes = {"n_embd": hidden, "n_inner": width, "n_layer": layers, "n_head": 1, "n_positions": 8}
        about = AutoConfig.for_model("gpt2", **common, **sizes, resid_pdrop=0.0)
    else:
        sizes = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
        sizes["num_attention_heads"] = 1
        about = AutoConfig.for_model("llama", **common, **sizes, max_position_embeddings=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(about, dtype=torch.float32).train()
    arm.apply(model)
    blocks = model.transformer.h if kind == "plain" else model.model.layers
    return nn.Sequential(*(block.mlp for block in blocks))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts all weights except ε, which stays float32, as in a model loaded in a lower precision."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] != "epsilon":
            parameter.data = parameter.data.to(dtype)


def _step(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    x = x[None].detach().requires_grad_()

    def step() -> None:
        module(x).backward(grad[None])
        # At the end, so that a step leaves no memory allocated; the gradients are part of the peak.
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step
