"""`crrelu bench train`: one full fine-tuning step of a model with its own activation, GELU and CRReLU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.bench.measure import Candidate, case, measure
from crrelu_llm.bench.patches import GELU, Arm, arms, backend_of
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading, section
from crrelu_llm.patching.patch import unpatch


def run(
    model: str,
    batch_size: int,
    length: int,
    dtypes: list[str],
    epsilon_per: str,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures forward pass, loss, backward pass and AdamW step on random tokens.

    Args:
        model: Hub name, directory, `.gguf` file or `builtin:nano`.
        batch_size: Rows of token ids.
        length: Tokens per row.
        dtypes: Names of torch dtypes, for the weights.
        epsilon_per: `"layer"` or `"channel"`.
        repeats: How many rounds.
        device: The device of the computation.
        say: Called with progress messages.

    Returns:
        `{model, cases, left_out}`; a case has the shape `(batch_size, length)`, and also `tokens_per_second`.

    Raises:
        InputError: The MODEL cannot be read or patched, or does not support the length.
    """
    cases: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for dtype in dtypes:
        say(f"{model}, {batch_size} x {length} tokens, {dtype}")
        original = _load(model, dtype, length).to(device)
        candidates = [
            Candidate(name, backend_of(name), "model", "both", step)
            for name, step in _steps(original, arms(epsilon_per), batch_size, length).items()
        ]
        measured, missing = measure(candidates, repeats, device)
        gelu = next(entry for entry in measured if entry.candidate.name == GELU)
        found = [case(entry, gelu, None, dtype, (batch_size, length)) for entry in measured]
        cases += [entry | {"tokens_per_second": tokens_per_second(entry)} for entry in found]
        left_out += missing
    return {"model": model, "cases": cases, "left_out": left_out}


def tokens_per_second(case: dict[str, Any]) -> float:
    """Tokens per second of a case with the shape `(batch_size, length)`."""
    batch_size, length = case["shape"]
    return batch_size * length / (case["milliseconds"] / 1e3)


def _load(name: str, dtype: str, length: int) -> Any:
    """The model with its original activations, in training mode."""
    model = loading.load_model(name, dtype=getattr(torch, dtype))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"--length {length}: {name} takes at most {limit} tokens; give fewer")
    if section.read(model.config) is not None:
        unpatch(model)
    return model.train()


def _steps(original: Any, compared: dict[str, Arm], batch_size: int, length: int) -> dict[str, Callable[[], None]]:
    """A step for each arm. All arms share the weights and AdamW's moments, which are in memory once."""
    models = {name: _patched(original, arm) for name, arm in compared.items()}
    parameters = {id(entry): entry for model in models.values() for entry in model.parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6)
    generator = torch.Generator().manual_seed(0)
    vocabulary = original.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch_size, length), generator=generator).to(original.device)
    return {name: _step(model, optimizer, ids) for name, model in models.items()}


def _patched(original: nn.Module, arm: Arm) -> Any:
    """A patched copy of the modules that shares the weights and buffers."""
    if arm.config is None:
        return original
    shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    model: Any = copy.deepcopy(original, shared)
    arm.apply(model)
    return model


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()  # leaves the other arms' ε alone: they have no gradient
        # At the end, so that a step leaves no memory allocated; the gradients are part of the peak.
        optimizer.zero_grad(set_to_none=True)

    return step
