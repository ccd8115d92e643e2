"""The training data of an image classifier: rows as pixels and labels, with reproducible random augmentation."""

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

    Augmentation and mixup of a row depend only on the seed, the epoch and the row: not on the batch, the process, the
    worker or earlier random draws. So a resumed training, and one in several processes, sees the same data as an
    uninterrupted training in one process.

    Args:
        rows: Rows with undecoded images (see `data.images.undecoded`).
        args: The training arguments, which name the columns.
        processor: The model's image processor.
        config: The model's config.
        name: The name of the data, for messages.
        augmentation: The augmentation of each image; None in evaluation.
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
        """The row with a number, which is `epoch × rows + index` in training (see `Epochs`)."""
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
        """Opens the image of a row."""
        entry = self.rows[index][self.image_column]
        return open_image(entry, self.channels, f"{self.name}: row {index + 1}")

    def _pixels(self, index: int, random: np.random.Generator) -> Tensor:
        image = self.image(index)
        if self.augmentation is not None:
            image = self.augmentation(image, random)
        return pixels_of(self.processor, [image])[0]


class Epochs(Sampler):
    """The rows of an epoch in the epoch's own order, as `epoch × rows + index`.

    Args:
        rows: The number of rows.
        seed: The seed of the order.
        epoch: Returns the number of the next epoch.
        shuffles: Whether each epoch has another order.
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
    """Collates rows into a batch.

    Raises:
        InputError: The images have several sizes.
    """
    if len(shapes := {tuple(row["pixel_values"].shape[1:]) for row in rows}) > 1:
        shown = ", ".join(f"{width}×{height}" for height, width in sorted(shapes))
        raise InputError(
            f"the images of a batch have several sizes ({shown}), and the model's processor does not resize; set "
            "do_resize in its preprocessor_config.json"
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
