"""The text that `crrelu plan` prints."""

from typing import Any

from crrelu_llm.columns import aligned
from crrelu_llm.training.kinds import kind_of

_COLUMNS = ("weights", "gradients", "optimizer", "reference", "activations", "buffers", "total")


def text(document: dict[str, Any]) -> str:
    """A plan from `plan.plan`, as a table with lines around it; sizes in GiB."""
    job, gpus = document["job"], document["gpus"]
    lines = [_model(document), _job(job), ""]
    where = "GiB of the process" if job["use_cpu"] else f"GiB per GPU, {gpus} GPU{'s' if gpus > 1 else ''}"
    columns = [
        name for name in _COLUMNS if name != "reference" or any(row["reference"] for row in document["configs"])
    ]
    fits = f"fits {document['gpu_memory']:g} GiB"
    table = [["config", *columns, fits]]
    table += [
        [row["config"], *(_gib(row[name]) for name in columns), "yes" if row["fits"] else "no"]
        for row in document["configs"]
    ]
    lines += [f"{where}; total is the largest moment of a step, not the sum", *aligned(table, "<>", "  ")]
    lines += [
        f"  {row['config']}: the largest moment is not in the step: {row['moment']}"
        for row in document["configs"]
        if row["moment"] != "step"
    ]
    lines += ["", "activations, in GiB: " + "; ".join(map(_variant, document["activations"]))]
    host = document["host"]
    lines.append(
        f"host: up to {_gib(host['loading_per_node'])} GiB a node while every process loads; on disk: "
        f"{_gib(host['checkpoint'])} GiB saved, {_gib(host['checkpoint_with_optimizer'])} with the optimiser's states"
    )
    lines += [document["counted"], "", _advice(document)]
    return "\n".join(lines)


def _model(document: dict[str, Any]) -> str:
    count = document["parameters"]
    return (
        f"{document['model_type']}: {count['total']:,} parameters, {count['trainable']:,} trained, "
        f"{count['epsilon']:,} of them ε"
    )


def _job(job: dict[str, Any]) -> str:
    what = "QLoRA" if job["load_in_4bit"] else "LoRA" if job["use_peft"] else "all weights"
    if job["use_peft"]:
        what += f" (r = {job['lora_r']})"
    precision = f"{job['dtype']} weights, " + ("bf16 computation" if job["bf16"] else "no autocast")
    rows = f"{job['per_device_train_batch_size']} x {job['max_length']} tokens"
    rows += " (pairs)" if kind_of(job["trainer"]).sequences > 1 else ""
    options = [
        key for key in ("gradient_checkpointing", "recompute_activation", "precompute_ref_log_probs") if job[key]
    ]
    parts = [job["trainer"].upper(), what, job["activation"], precision, rows, *options]
    if job["gradient_accumulation_steps"] > 1:
        parts.append(f"gradient_accumulation_steps {job['gradient_accumulation_steps']}")
    return ", ".join(parts)


def _variant(variant: dict[str, Any]) -> str:
    names = [name for name in ("gradient_checkpointing", "recompute_activation") if variant[name]]
    return f"{_gib(variant['bytes'])} with {' and '.join(names) or 'neither'}"


def _advice(document: dict[str, Any]) -> str:
    if document["recommended"] is None:
        more = "a machine with more memory" if document["job"]["use_cpu"] else "more GPUs"
        return (
            f"nothing fits: take {more}, a smaller per_device_train_batch_size or max_length, "
            "gradient_checkpointing, or use_peft"
        )
    if document["job"]["use_cpu"]:
        return f"recommended: crrelu {document['command'].partition('-m crrelu_llm ')[2]} --use_cpu true"
    return f"recommended: {document['recommended']}\n  {document['command']}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
