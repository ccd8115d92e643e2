"""What an image classifier is trained on: rows as pixels and labels, each row's chance decided by its own number."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from crrelu_llm.data.images import label_numbers, open_image
from crrelu_llm.errors import InputError
from crrelu_llm.patching.calibration.pixels import channels_of, pixels_of
from crrelu_llm.training.augmentation import Augmentation


class Pictures(Dataset):
    """Rows of a data set as `pixel_values` and `labels`.

    What augmentation and mixup do to a row depends on the seed, the epoch and the row alone: not on the batch, the
    process or the worker that it comes to, nor on what was drawn before. So a training that goes on, and one in
    several processes, sees what one in one piece sees.

    Args:
        rows: With undecoded images (see `data.images.undecoded`).
        args: The training arguments, which name the columns.
        processor: The model's image processor.
        config: The model's config.
        name: Of the data, for messages.
        augmentation: What is done to each image; None in evaluation.
    """

    def __init__(
        self, rows: Any, args: Any, processor: Any, config: Any, name: str, augmentation: Augmentation | None = None
    ):
        self.rows, self.name, self.processor, self.augmentation = rows, name, processor, augmentation
        self.image_column, self.seed = args.image_column_name, args.seed
        self.mixup_alpha = 0.0 if augmentation is None else args.mixup_alpha
        self.channels, self.classes = channels_of(config), config.num_labels
        self.labels = label_numbers(rows, args.label_column_name, config.label2id, name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The row of a number; `epoch × rows + index` in training (see `Epochs`)."""
        epoch, index = divmod(int(number), len(self))
        random = np.random.default_rng([self.seed, epoch, index])
        pixels, label = self._pixels(index, random), torch.tensor(self.labels[index])
        if self.mixup_alpha:
            share = float(random.beta(self.mixup_alpha, self.mixup_alpha))
            other = int(random.integers(len(self)))
            pixels = share * pixels + (1 - share) * self._pixels(other, random)
            label = torch.zeros(self.classes)
            label[self.labels[index]] += share
            label[self.labels[other]] += 1 - share
        return {"pixel_values": pixels, "labels": label}

    def image(self, index: int) -> Any:
        """The image of a row, opened."""
        entry = self.rows[index][self.image_column]
        return open_image(entry, self.channels, f"{self.name}: row {index + 1}")

    def _pixels(self, index: int, random: np.random.Generator) -> Tensor:
        image = self.image(index)
        if self.augmentation is not None:
            image = self.augmentation(image, random)
        return pixels_of(self.processor, [image])[0]


class Epochs(Sampler):
    """The rows of an epoch in an order of its own, as `epoch × rows + index`.

    Args:
        rows: How many there are.
        seed: Of the order.
        epoch: Gives the number of the epoch that begins.
        shuffles: Whether there is another order in each epoch.
    """

    def __init__(self, rows: int, seed: int, epoch: Callable[[], int], shuffles: bool = True):
        self.rows, self.seed, self.epoch, self.shuffles = rows, seed, epoch, shuffles

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows) if self.shuffles else range(self.rows)
        return iter([epoch * self.rows + int(index) for index in order])


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows.

    Raises:
        InputError: Their images have several sizes.
    """
    if len(shapes := {tuple(row["pixel_values"].shape[1:]) for row in rows}) > 1:
        shown = ", ".join(f"{width}×{height}" for height, width in sorted(shapes))
        raise InputError(
            f"the images of a batch have several sizes ({shown}), and the model's processor does not resize; set "
            "do_resize in its preprocessor_config.json"
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
