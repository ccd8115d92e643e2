"""Compares the outputs and the speed of an export with those of the model."""

import time
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.errors import InputError
from crrelu_llm.export.runtimes import Runtime

# English text written for this check: the first part is the prompt, and the whole text is compared.
TEXT = (
    "A river begins as rain that falls on high ground. It runs down the slopes in small streams, which meet and grow. "
    "In the valley the water is slow and brown, and the towns on its banks have mills, bridges and boats. Where the "
    "river reaches the sea, it leaves the sand that it has carried, and new land rises there year after year."
)
_PROMPT, _COMPARED, _GENERATED = 16, 64, 32
_ROUNDS = 3  # in turns; the fastest of each counts, because the load of the machine varies
# The largest difference of logits allowed in an export, as a share of the largest logit.
_TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}


def tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Tokens to compare, `(1, 64)`: English text, or tokens from the vocabulary if there is no tokenizer."""
    ids = [] if tokenizer is None else tokenizer(TEXT, add_special_tokens=True)["input_ids"]
    if len(ids) < _COMPARED:
        ids = [*ids, *(7 * at % (vocabulary - 1) + 1 for at in range(_COMPARED))]
    return torch.tensor([ids[:_COMPARED]])


def compare(model: Runtime, export: Runtime, ids: Tensor, dtype: str, name: str) -> dict[str, Any]:
    """Compares the model and the export on the same tokens: logits, greedy continuation, speed.

    Returns:
        `largest_logit_difference`, `largest_logit`, `greedy_equal`, `tokens_per_second` of `torch` and `runtime`.

    Raises:
        InputError: The logits of the export differ.
    """
    expected, found = (_logits(runtime, ids) for runtime in (model, export))
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= _TOLERANCE[dtype] * largest:  # also refuses NaN
        raise InputError(
            f"{name}: the logits of the export differ from torch's: the largest difference is {difference:.3g}, the "
            f"largest logit {largest:.3g}; nothing was written, choose another --format or --dtype"
        )
    prompt = ids[:, :_PROMPT]
    rounds = [(_greedy(model, prompt), _greedy(export, prompt)) for _ in range(_ROUNDS)]
    (wanted, _), (got, _) = rounds[0]
    torch_speed, runtime_speed = (max(speed for _, speed in found) for found in zip(*rounds, strict=True))
    return {
        "largest_logit_difference": difference,
        "largest_logit": largest,
        "compared_tokens": ids.shape[1],
        "greedy_equal": wanted == got,
        "greedy_tokens": len(wanted),
        "tokens_per_second": {"torch": torch_speed, "runtime": runtime_speed},
    }


def _logits(runtime: Runtime, ids: Tensor) -> Tensor:
    """Logits of a first part, of one further token, and of the rest at once, to test all uses of a cache."""
    runtime.begin()
    return torch.cat(
        [runtime(part) for part in (ids[:, :_PROMPT], ids[:, _PROMPT : _PROMPT + 1], ids[:, _PROMPT + 1 :])], 1
    )


def _greedy(runtime: Runtime, prompt: Tensor) -> tuple[list[int], float]:
    """The greedy continuation of a prompt, and the tokens per second."""
    runtime.begin()
    after = runtime(prompt)[:, -1].argmax(-1)
    runtime(after[None])  # a warm-up: the first single token may include one-time work
    runtime.begin()
    made: list[int] = []
    started = time.perf_counter()
    after = runtime(prompt)[:, -1].argmax(-1)
    for _ in range(_GENERATED):
        made.append(int(after))
        after = runtime(after[None])[:, -1].argmax(-1)
    return made, _GENERATED / (time.perf_counter() - started)
