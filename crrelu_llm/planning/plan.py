"""The plan of a job: the memory per GPU in each configuration, the recommended one, and the command that starts it."""

from dataclasses import asdict, fields, replace
from math import ceil
from typing import Any

import torch

from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading
from crrelu_llm.planning.job import Job
from crrelu_llm.planning.model import prepared_config, weight_bytes
from crrelu_llm.planning.spread import Share, Steps, shares

# Reserved for memory that is not counted (the CUDA context, NCCL's buffers, fragmentation).
RESERVE = 0.1
# Fastest first, if several fit; DeepSpeed's come later, because they need one more package.
_PREFERENCE = ("single_gpu", "ddp", "fsdp2", "multi_node", "zero2", "zero3")
COUNTED = (
    "counted: every tensor of a step, padded to max_length. Not counted: the CUDA context (0.5 GiB or so), NCCL's "
    f"buffers, fragmentation; for these {RESERVE:.0%} of a GPU is left free"
)


def plan(config: Any, job: Job, gpus: int, gpus_per_node: int, gpu_memory: float) -> dict[str, Any]:
    """Plans a job.

    Args:
        config: The model's own config.
        job: The training run.
        gpus: Total number of GPUs.
        gpus_per_node: Number of GPUs per machine.
        gpu_memory: Memory of one GPU, in GiB.

    Returns:
        `{model_type, parameters, job, gpus, gpus_per_node, gpu_memory, configs, recommended, activations, host,
        counted}`; all sizes in bytes, except `gpu_memory`. `recommended` is None if nothing fits.

    Raises:
        InputError: The model cannot be planned, or the options contradict it.
    """
    if loading.head_of(config) == loading.IMAGE_CLASSIFIER:
        raise InputError(f"crrelu plan counts tokens, and {config.model_type} takes images; give a language model")
    if min(gpus, gpus_per_node) < 1:
        raise InputError(f"gpus and gpus_per_node must be 1 or more, not {gpus} and {gpus_per_node}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise InputError(f"{gpus} GPUs do not fill whole nodes with {gpus_per_node} each; set gpus_per_node")
    if not 0 < gpu_memory < float("inf"):
        raise InputError(f"gpu_memory must be more than 0 GiB, not {gpu_memory}")
    if job.use_cpu and gpus > 1:
        raise InputError("use_cpu plans for one process; leave gpus out")
    _check_length(config, job)
    steps = Steps(prepared_config(config, job), job)
    rows = shares(steps, gpus, gpus_per_node)
    limit = gpu_memory * 2**30 * (1 - RESERVE)
    fitting = [row for row in rows if row.total <= limit]
    best = min(fitting, key=lambda row: _PREFERENCE.index(row.config), default=None)
    counts = steps.sharded().counts if best is not None and best.config not in ("single_gpu", "ddp") else None
    counts = counts or steps.replicated().counts
    return {
        "model_type": config.model_type,
        "parameters": {"total": counts.total, "trainable": counts.trainable, "epsilon": counts.epsilon},
        "job": asdict(job),
        "gpus": gpus,
        "gpus_per_node": min(gpus, gpus_per_node),
        "gpu_memory": gpu_memory,
        "configs": [asdict(row) | {"fits": row.total <= limit} for row in rows],
        "recommended": None if best is None else best.config,
        "command": None if best is None else command(job, best.config, gpus, gpus_per_node),
        "activations": _variants(config, steps, best or rows[-1]),
        "host": _host(steps, gpus, gpus_per_node),
        "counted": COUNTED,
    }


def command(job: Job, config: str, gpus: int, gpus_per_node: int) -> str:
    """The command that starts the job; `R.yaml` stands for the recipe, and the planned options override its own."""
    nodes = ceil(gpus / gpus_per_node)
    launch = ["accelerate launch --config_file", f"recipes/accelerate_configs/{config}.yaml"]
    if config != "single_gpu":
        launch.append(f"--num_processes {gpus}")
    if nodes > 1:
        launch.append(f"--num_machines {nodes} --machine_rank RANK --main_process_ip IP --main_process_port 29500")
    left_out = {"trainer", "use_cpu"}
    if not job.may_precompute:
        left_out.add("precompute_ref_log_probs")
    if job.kind.samples:  # the length of prompt and answer together
        left_out.add("max_length")
    if not job.use_peft:
        left_out.add("lora_r")
    if job.activation == "native":
        left_out |= {"activation", "epsilon_per", "calibration", "recompute_activation"}
    if job.affine_learning_rate == 0:
        left_out.add("affine_learning_rate")
    options = [
        f"--{entry.name} {str(getattr(job, entry.name)).lower()}"
        for entry in fields(Job)
        if entry.name not in left_out
    ]
    return " ".join([*launch, f"-m crrelu_llm {job.trainer} --config R.yaml", *options])


def _variants(config: Any, planned: Steps, row: Share) -> list[dict[str, Any]]:
    """The activation memory of one configuration with and without the options that reduce it."""
    job, result = planned.job, []
    for checkpointing in (True, False):
        for recompute in (False, True) if job.activation in ("crrelu", "native") else (False,):
            variant = replace(job, gradient_checkpointing=checkpointing, recompute_activation=recompute)
            steps = planned if variant == job else Steps(prepared_config(config, variant), variant)
            step = steps.replicated() if row.config in ("single_gpu", "ddp") else steps.sharded()
            result.append(
                {
                    "gradient_checkpointing": checkpointing,
                    "recompute_activation": recompute,
                    "bytes": step.activations,
                    "kept": step.kept,
                }
            )
    return result


def _host(steps: Steps, gpus: int, gpus_per_node: int) -> dict[str, int]:
    """Host memory of a node while every process loads the model, and the sizes on disk."""
    job, counts = steps.job, steps.replicated().counts
    base = (counts.total - counts.adapters) * getattr(torch, job.dtype).itemsize + counts.buffer_bytes
    models = 2 if job.has_reference else 1
    saved = counts.adapters * _saved_bytes(job) if job.use_peft else base
    return {
        "loading_per_node": ceil(base * models * min(gpus, gpus_per_node)),
        "checkpoint": ceil(saved),
        "checkpoint_with_optimizer": ceil(saved + 2 * steps.replicated().gradients),
        "weights": ceil(weight_bytes(counts, job)),
    }


def _saved_bytes(job: Job) -> int:
    return 2 if job.load_in_4bit else 4


def _check_length(config: Any, job: Job) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and job.max_length > limit:
        raise InputError(
            f"max_length {job.max_length}: the model takes at most {limit} tokens; set max_length to {limit} or less"
        )
