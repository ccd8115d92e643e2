"""Evaluates an image classifier: cross-entropy, top-1 and top-5 accuracy, with a value per image."""

from typing import Any

import torch
from torch import Tensor

from crrelu_llm.evaluation.items import batches, evaluating
from crrelu_llm.evaluation.measured import Evaluated, ItemText

_TOP = 5


def evaluate_image(trainer: Any) -> Evaluated:
    """Loss, top-1 accuracy and, with more than five labels, top-5 accuracy; items are the images."""
    rows = []
    with evaluating(trainer) as model:
        for batch in batches(trainer):
            labels = batch.pop("labels")
            with torch.no_grad(), trainer.compute_loss_context_manager():
                logits = logits_of(model(**batch)).float()
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            row = torch.stack([losses.double(), *hits(logits, labels).double().unbind(1)], dim=1)
            rows.append(trainer.accelerator.gather_for_metrics(row).cpu())
    columns = dict(zip(("loss", "accuracy", "top5_accuracy"), torch.cat(rows).numpy().T, strict=True))
    if trainer.model.config.num_labels <= _TOP:
        del columns["top5_accuracy"]
    return {name: float(values.mean()) for name, values in columns.items()}, {
        name: values.tolist() for name, values in columns.items()
    }


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model's outputs: `(images, labels)`."""
    return outputs["logits"] if "logits" in outputs else outputs[0]


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is the first choice, and whether it is one of the first five: `(images, 2)`."""
    found = logits.topk(min(_TOP, logits.shape[-1])).indices == labels[:, None]
    return torch.stack([found[:, 0], found.any(1)], dim=1)


def image_texts(trainer: Any) -> list[ItemText]:
    """The index of each image in the data, and its label."""
    data, names = trainer.eval_dataset, trainer.model.config.id2label
    return [ItemText(prompt=f"image {index}: {names[label]}", options=[]) for index, label in enumerate(data.labels)]
