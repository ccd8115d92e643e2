"""The sparsity of a model: the share of exact zeros in the output of each MLP activation."""

import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crrelu_llm.activation import AffineModule
from crrelu_llm.compat.peft import site_path
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.items import evaluating
from crrelu_llm.patching import section
from crrelu_llm.patching.activations import PEFT_WRAPPER
from crrelu_llm.patching.sites import find_sites
from crrelu_llm.report.schema import Sparsity

TOKENS, ROWS, LONGEST = 2048, 32, 512  # at most so many tokens, rows, and tokens per row


class Zeros:
    """Counts the zeros in the output of every MLP activation, patched or original, by forward hooks.

    The output is that of the activation itself, before the product in a gated MLP: where it is exactly 0, the input of
    the following projection is 0 too. Where f is 0, a calibrated activation, gain·f(scale·(x + shift)) + offset,
    returns the offset of its channel, which is a constant but not zero. These outputs are counted separately.

    Args:
        model: A causal LM or classifier, patched or not; PEFT may wrap it.
    """

    def __init__(self, model: nn.Module):
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        paths = {section.local_path(base, path) or path: path for path in _paths(base)}
        self._sums: dict[str, list[Tensor | int]] = {path: [0, 0, 0] for path in paths.values()}
        self._calibrated: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for name, module in base.named_modules(remove_duplicate=False):  # layers may share one instance
            path = paths.get(site_path(name))
            if path is None or type(module).__name__ == PEFT_WRAPPER:
                continue
            if isinstance(module, AffineModule):
                # Before the forward pass, when sharded parameters are gathered.
                hook = module.register_forward_pre_hook(
                    lambda m, args, path=path: self._add(path, m, m.forward(args[0]))
                )
            else:
                hook = module.register_forward_hook(lambda m, args, y, path=path: self._add(path, m, y))
            self._handles.append(hook)

    @torch.no_grad()
    def _add(self, path: str, module: nn.Module, output: Tensor) -> None:
        offset: Any = getattr(module, "offset", None)
        found: list[Tensor | int] = [output.numel(), (output == 0).sum(), 0]
        if isinstance(offset, Tensor):
            self._calibrated.add(path)
            found[2] = (output == offset.to(output)).sum()
        self._sums[path] = [before + now for before, now in zip(self._sums[path], found, strict=True)]

    def take(self, tokens: int = 0) -> Sparsity:
        """Removes the hooks and returns the shares; only calibrated sites have a share at the offset.

        Args:
            tokens: The number of tokens of the forward passes, for the record.
        """
        for handle in self._handles:
            handle.remove()
        counts = {path: [int(value) for value in sums] for path, sums in self._sums.items()}
        return Sparsity(
            tokens=tokens,
            zeros={path: zeros / total for path, (total, zeros, _) in counts.items() if total},
            at_offset={
                path: count / total for path, (total, _, count) in counts.items() if total and path in self._calibrated
            },
        )


def _paths(model: Any) -> list[str]:
    """The sites of a model in order: those of its config section, and those that keep their activation."""
    found = section.read(model.config)
    patched = [site["path"] for site in found["sites"]] if found else []
    try:
        others = [site.path for site in find_sites(model)]
    except InputError:
        others = []
    local = [section.local_path(model, path) or path for path in patched]
    others = [path for path in others if not any(f"{path}.".startswith(f"{known}.") for known in local)]
    return sorted([*patched, *others], key=_in_order)


def _in_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def sparsity(model: Any, sequences: Iterable[list[int]], compute: Any = None) -> Sparsity:
    """The sparsity of a model in evaluation mode on sequences of token ids, one at a time and so without padding.

    Args:
        model: As for `Zeros`.
        sequences: Token ids; the first `LONGEST` of each sequence count, and at most `TOKENS` in total.
        compute: The model to call, if `model` is wrapped.

    Returns:
        The shares; an empty record without sequences.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    longest = min(LONGEST, getattr(base.config.get_text_config(), "max_position_embeddings", None) or LONGEST)
    counted, tokens, device = Zeros(model), 0, next(base.parameters()).device
    try:
        for ids in itertools.islice(sequences, ROWS):
            batch = torch.tensor([ids[: min(longest, TOKENS - tokens)]], device=device)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                (model if compute is None else compute)(input_ids=batch, use_cache=False, **few)
            tokens += batch.numel()
            if tokens >= TOKENS:
                break
    finally:
        shares = counted.take(tokens)
    return shares if tokens else Sparsity()


def sparsity_of_trainer(trainer: Any) -> Sparsity:
    """The sparsity of a trainer's model on the first rows of its evaluation data; if the trainer samples, on prompts.

    Every process computes all rows, because a sharded model needs all processes.
    """
    with evaluating(trainer) as compute, trainer.compute_loss_context_manager():
        return sparsity(trainer.model, _sequences(trainer), compute)


def _sequences(trainer: Any) -> Iterator[list[int]]:
    """The rows as in training: each with its answer, or with the chosen one of its two answers."""
    for row in trainer.eval_dataset:
        if "input_ids" in row:
            lengths = row.get("seq_lengths")  # the first of several documents in a row
            ids = row["input_ids"][: lengths[0] if lengths else None]
        elif "chosen_ids" in row or "completion_ids" in row:
            ids = [*row.get("prompt_ids", ()), *row.get("chosen_ids", row.get("completion_ids"))]
        elif "prompt" in row and hasattr(trainer, "_tokenize_prompts"):
            ids = trainer._tokenize_prompts([row["prompt"]])[0][0]
        else:
            return
        if len(ids):
            yield list(ids)
