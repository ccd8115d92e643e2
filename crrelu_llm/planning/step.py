"""Simulates one training step on fake tensors, and counts the memory that torch would allocate.

The memory of a layer does not come from a formula: the model's own code, autograd, autocast, gradient checkpointing,
TRL's fused LM head and `recompute_activation` run as in training, on tensors with a size but no contents.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crrelu_llm.compat.torch import FakeTensorMode, TorchDispatchMode, tree_iter
from crrelu_llm.compat.trl import head_of_a_gpu
from crrelu_llm.errors import InputError
from crrelu_llm.planning.job import Job
from crrelu_llm.planning.model import Counts, build, count, give_fake_tensors, reference


@dataclass(frozen=True)
class Step:
    """The memory of a step beyond weights, optimiser states and reference, in bytes.

    Attributes:
        moments: Pairs: the size of the complete gradients, and the peak of everything else at that time.
        kept: The memory that the forward pass stores for the backward pass.
        in_reference: The peak while DPO's reference computes, including the memory stored by the forward pass.
        counts: The parameters of the trained model.
    """

    moments: tuple[tuple[int, int], ...]
    kept: int
    in_reference: int
    counts: Counts

    @property
    def activations(self) -> int:
        """The peak without complete gradients: activations, and temporary memory of operators."""
        return max(other for _, other in self.moments)

    @property
    def gradients(self) -> int:
        """All gradients, in the dtype in which they arrive."""
        return self.moments[-1][0]

    def peak(self, share: float, accumulates: bool) -> float:
        """The peak of gradients and everything else together.

        Args:
            share: Bytes that stay per byte of gradient (1; less if gradients are sharded).
            accumulates: Whether the gradients of earlier batches exist from the start.
        """
        if accumulates:
            return self.gradients * share + self.activations
        return max(complete * share + other for complete, other in self.moments)


def play(config: Any, job: Job, dtype: torch.dtype, autocast: bool) -> Step:
    """Simulates one step of a job.

    Args:
        config: From `prepared_config`.
        job: The training run.
        dtype: The dtype of the weights in the step.
        autocast: Whether matrix products are cast to bfloat16.

    Raises:
        InputError: The model's own code needs the values of tensors.
    """
    model = build(config, job, dtype)
    second = reference(config, dtype) if job.has_reference else None
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # repeats the raised error at length
    try:
        with FakeTensorMode(), contextlib.nullcontext() if job.use_cpu else head_of_a_gpu():
            return _play(model, second, job, autocast)
    except InputError:
        raise
    except Exception as error:  # a family's own code may do things that only real tensors support
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        hint = "; its experts take --dtype bfloat16" if "Expected inputs of BF16 type" in line else ""
        raise InputError(
            f"model type {config.model_type} cannot be planned: a step on tensors without contents fails with "
            f"{type(error).__name__}: {line.strip()[:120]}{hint}"
        ) from error


def _play(model: Any, second: Any, job: Job, autocast: bool) -> Step:
    models = [module for module in (model, second) if module is not None]
    for module in models:
        give_fake_tensors(module)
    tracker = _Tracker(models)
    _take_gradients_away(model, tracker)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    in_reference = 0
    with tracker:
        ids = torch.ones((job.rows, job.max_length), dtype=torch.long)
        # A padded batch: rows of equal length would need no mask, and a little less memory.
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
        if job.kind.samples:
            _sample(model, job, precision)
        scores = job.kind.auto_class.endswith("SequenceClassification")
        if scores:
            del batch["labels"]
        else:
            batch["fused_lm_head"] = True
        with precision:
            output = model(**batch)
        kept = tracker.other
        if job.kind.reference and not job.precompute_ref_log_probs:
            with torch.no_grad(), tracker.watch() as seen, precision, _without_adapters(model, second) as other:
                other(**batch)
            in_reference = seen()
        loss = (output.logits if scores else output.log_probs).sum()
        tracker.backward = True
        loss.backward()
    tracker.note()
    return Step(tuple(sorted(tracker.peaks.items())), kept, in_reference, count(model, job))


@torch.no_grad()
def _sample(model: Any, job: Job, precision: Any) -> None:
    """Samples the last token of the answers for the next steps, when the keys and values of all tokens are held."""
    ids = torch.ones((job.rows * job.gradient_accumulation_steps, job.max_length), dtype=torch.long)
    model.eval()
    with precision:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    model.train()


@contextlib.contextmanager
def _without_adapters(model: Any, second: Any) -> Iterator[Any]:
    """The reference: the second model, or the trained one with its adapters disabled and no checkpointing."""
    if second is not None:
        yield second
        return
    with model.disable_adapter():
        yield model


class _Tracker(TorchDispatchMode):
    """Counts the memory of every tensor that an operator creates, until the last reference is gone."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.other = self.gradients = 0
        self.backward = False  # whether the backward pass has begun
        self.peaks = {0: 0}  # by the size of the complete gradients
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._watched = 0
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        # Autograd accumulates gradients in place, except under a dispatch mode like this one. Recording the sum only
        # at the next operator avoids counting the first summand, unless it is still in use.
        if not (self.backward and func is torch.ops.aten.add.Tensor):
            self.note()
        return result

    def note(self) -> None:
        """Records the present memory."""
        self.peaks[self.gradients] = max(self.peaks.get(self.gradients, 0), self.other)
        self._watched = max(self._watched, self.other)

    def _add(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen[storage] = None
            size = storage.nbytes()
            self.other += size
            weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.other -= size

    @contextlib.contextmanager
    def watch(self) -> Iterator[Callable[[], int]]:
        """A context that yields a function, which returns the peak inside the context."""
        self._watched = self.other
        yield lambda: self._watched


def _take_gradients_away(model: nn.Module, tracker: _Tracker) -> None:
    """Counts each gradient when it is complete, and releases it: `spread` models how much of it each GPU keeps."""

    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        tracker.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take)
