"""Memory of one GPU under each Accelerate configuration of `recipes/accelerate_configs`, in bytes.

The sharding rules follow the source of the versions in `constraints.txt` (torch 2.13, accelerate 1.15, trl 1.16,
DeepSpeed 0.19) with the shipped configurations; the step itself is simulated (see `step`).
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from crrelu_llm.planning.job import Job
from crrelu_llm.planning.model import weight_bytes
from crrelu_llm.planning.step import Step, play

_FLOAT32 = 4
# DeepSpeed's defaults, which the shipped configurations keep: elements in the bucket for reducing gradients, and the
# most parameters that ZeRO-3 keeps gathered.
_BUCKET = 500_000_000
_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Share:
    """Memory of one GPU, in bytes.

    Attributes:
        config: Name of the file in `recipes/accelerate_configs`.
        weights: Weights between steps, without master copies.
        gradients: All gradients that stay on this GPU.
        optimizer: AdamW's two moments, and float32 master weights if a library makes them.
        reference: DPO's reference model, between its forward passes.
        activations: The peak of the step itself: activations, and temporary memory of operators.
        buffers: Communication buffers of the library: gathered weights, buckets of gradients.
        total: The peak of training. Gradients and activations do not peak together, so the total can be less than the
            sum; it can be more if the peak is outside the step (see `moment`).
        moment: The moment of the peak.
    """

    config: str
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    buffers: int
    total: int
    moment: str


class Steps:
    """A job's step in the precisions of the configurations, each simulated once."""

    def __init__(self, config: Any, job: Job) -> None:
        self.config, self.job = config, job
        self._played: dict[tuple[torch.dtype, bool], Step] = {}

    def replicated(self) -> Step:
        """With weights in the loaded dtype, which autocast casts for each matrix product."""
        return self._play(getattr(torch, self.job.dtype), self.job.bf16)

    def sharded(self) -> Step:
        """With all weights cast to bfloat16: by FSDP2 when it gathers them, by DeepSpeed at the start."""
        return self._play(torch.bfloat16 if self.job.bf16 else getattr(torch, self.job.dtype), self.job.bf16)

    def _play(self, dtype: torch.dtype, autocast: bool) -> Step:
        key = (dtype, autocast)
        if key not in self._played:
            self._played[key] = play(self.config, self.job, dtype, autocast)
        return self._played[key]


def shares(steps: Steps, gpus: int, gpus_per_node: int) -> list[Share]:
    """Memory of a GPU under each configuration for this number of GPUs, simplest first."""
    job = steps.job
    if gpus == 1:
        return [single_gpu(steps)]
    fsdp2_name = "multi_node" if gpus > gpus_per_node else "fsdp2"
    if job.load_in_4bit:  # 4-bit models can be sharded too, but their memory is not modelled
        return [ddp(steps)]
    return [ddp(steps), fsdp2(steps, gpus, fsdp2_name), zero2(steps, gpus), zero3(steps, gpus)]


def single_gpu(steps: Steps) -> Share:
    """One process: everything whole."""
    return _replicated("single_gpu", steps, 0)


def ddp(steps: Steps) -> Share:
    """Everything whole on every GPU, and a second copy of the gradients: DDP's buckets."""
    return _replicated("ddp", steps, steps.replicated().gradients)


def _replicated(name: str, steps: Steps, buckets: float) -> Share:
    job, step = steps.job, steps.replicated()
    weights = weight_bytes(step.counts, job)
    base = weights - step.counts.adapters * (2 if job.load_in_4bit else _FLOAT32)
    reference = base if job.has_reference else 0
    if job.load_in_4bit:  # one dequantised weight for the computation
        buckets += step.counts.largest * 2
    optimizer = 2 * step.gradients  # torch keeps the moments in the parameters' dtype
    held = weights + optimizer + reference + buckets
    moments = {"step": held + step.peak(1, job.gradient_accumulation_steps > 1)}
    return _share(name, weights, step.gradients, optimizer, reference, step.activations, buckets, moments)


def fsdp2(steps: Steps, gpus: int, name: str = "fsdp2") -> Share:
    """Float32 weights, gradients and moments sharded over the GPUs; the weights of two successive units gathered."""
    job, step, counts, each = steps.job, steps.sharded(), steps.sharded().counts, _compute_bytes(steps.job)
    loaded = getattr(torch, job.dtype).itemsize
    # Accelerate casts trained parameters to float32 before it shards them, unless nothing is cast.
    trained = _FLOAT32 if job.bf16 else loaded
    weights = (counts.trainable * trained + (counts.total - counts.trainable) * loaded) / gpus + counts.buffer_bytes
    gradients, optimizer = counts.trainable * trained / gpus, 2 * counts.trainable * trained / gpus
    reference = counts.total * loaded / gpus + counts.buffer_bytes if job.has_reference else 0
    # Backward: the weights of two successive units, one unit's gradients, and a copy of them for communication.
    unit = max(2 * counts.unit + 2 * counts.unit_trainable, counts.embedding * 2, counts.tail_trainable)
    buffers = (counts.tail + unit) * each
    held = weights + optimizer + reference
    share = gradients / step.gradients
    moments = {"step": held + buffers + step.peak(share, job.gradient_accumulation_steps > 1)}
    if job.has_reference:
        earlier = gradients if job.gradient_accumulation_steps > 1 else 0
        moments["reference"] = held + earlier + buffers + step.in_reference
    return _share(name, weights, gradients, optimizer, reference, step.activations, buffers, moments)


def zero2(steps: Steps, gpus: int) -> Share:
    """Whole weights; gradients, moments and master weights sharded over the GPUs."""
    job, step, counts, each = steps.job, steps.sharded(), steps.sharded().counts, _compute_bytes(steps.job)
    weights = counts.total * each + counts.buffer_bytes
    gradients, optimizer = counts.trainable * each / gpus, 3 * counts.trainable * _FLOAT32 / gpus
    reference = weights if job.has_reference else 0
    buffers = _BUCKET * each
    held = weights + optimizer + reference
    share = gradients / step.gradients
    moments = {
        "step": held + buffers + step.peak(share, job.gradient_accumulation_steps > 1),
        "update": held + gradients + counts.trainable * _FLOAT32 / gpus,  # gradients also in float32
    }
    return _share("zero2", weights, gradients, optimizer, reference, step.activations, buffers, moments)


def zero3(steps: Steps, gpus: int) -> Share:
    """Everything sharded over the GPUs; up to a billion (10⁹) parameters stay gathered."""
    job, step, counts, each = steps.job, steps.sharded(), steps.sharded().counts, _compute_bytes(steps.job)
    weights = counts.total * each / gpus + counts.buffer_bytes
    gradients, optimizer = counts.trainable * each / gpus, 3 * counts.trainable * _FLOAT32 / gpus
    reference = weights if job.has_reference else 0
    gathered = min(counts.total, _LIVE) * each
    buffers = gathered + _BUCKET * each
    held = weights + optimizer + reference
    share = gradients / step.gradients
    moments = {
        "step": held + buffers + step.peak(share, accumulates=True),  # the gradient buffer is allocated once
        "update": held + gradients + min(counts.trainable / gpus, _LIVE) * _FLOAT32,
    }
    if job.has_reference:
        moments["reference gathered"] = held + gradients + 2 * gathered + step.in_reference
    return _share("zero3", weights, gradients, optimizer, reference, step.activations, buffers, moments)


def _share(
    config: str,
    weights: float,
    gradients: float,
    optimizer: float,
    reference: float,
    activations: float,
    buffers: float,
    moments: dict[str, float],
) -> Share:
    moment = max(moments, key=moments.__getitem__)
    return Share(
        config,
        ceil(weights),
        ceil(gradients),
        ceil(optimizer),
        ceil(reference),
        ceil(activations),
        ceil(buffers),
        ceil(moments[moment]),
        moment,
    )


def _compute_bytes(job: Job) -> int:
    return 2 if job.bf16 else getattr(torch, job.dtype).itemsize
