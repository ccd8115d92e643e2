"""Calibration images as pixels, and the accuracy of a model on labelled images before and after a patch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crrelu_llm.data.images import image_column, label_numbers, open_image, undecoded
from crrelu_llm.errors import InputError, reading
from crrelu_llm.patching.finite import evaluating

TEXT = "builtin:docstrings"
_BATCH = 32


def calibration_pixels(data: str, processor: Any, images: int, config: Any) -> Tensor:
    """Reads calibration images, evenly spread over the rows of the split `calibration`, else `train`.

    Args:
        data: A local file or folder, or a hub name.
        processor: The model's image processor.
        images: How many.
        config: The model's config.

    Returns:
        `(images, channels, height, width)`, float32.

    Raises:
        InputError: The data cannot be read, is text, or holds fewer images.
    """
    return _pixels(*_rows(data, ("calibration", "train", "validation"), images), processor, config, data)


def probe_pixels(processor: Any, config: Any) -> Tensor:
    """The pixels of one image of noise, in the model's input size."""
    import numpy as np
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(grey).convert("RGB" if channels_of(config) == 3 else "L")
    return pixels_of(processor, [image])


def channels_of(config: Any) -> int:
    """How many channels the pixels of an image model have: 3, or 1 where its config says so."""
    return 1 if getattr(config, "num_channels", 3) == 1 else 3


def pixels_of(processor: Any, images: list[Any]) -> Tensor:
    """The pixels that a processor returns for images: `(images, channels, height, width)`, float32.

    Raises:
        InputError: The processed images have different sizes.
    """
    sizes = {image.size for image in images}
    if images[0].mode == "L":  # processors need a channel axis, and cannot infer which axis it is here
        import numpy as np

        arrays = [np.asarray(image)[None] for image in images]
        made = processor(images=arrays, return_tensors="pt", input_data_format="channels_first", do_convert_rgb=False)
        return made["pixel_values"].float()
    try:
        made = processor(images=images, return_tensors="pt")["pixel_values"]
    except (ValueError, RuntimeError) as error:
        if len(sizes) == 1:
            raise
        shown = ", ".join(f"{width}×{height}" for width, height in sorted(sizes)[:3])
        raise InputError(
            f"the images have several sizes ({shown}), and the model's processor does not resize; set do_resize in "
            "its preprocessor_config.json"
        ) from error
    return made.float()


def measure_images(
    data: str, processor: Any, config: Any, images: int
) -> tuple[Callable[[Any], dict[str, float]], int] | None:
    """Prepares the measurement of accuracy and loss on labelled images of the split `test`, else `validation`.

    Returns:
        A function of the model that returns `{accuracy, loss}`, and the number of images; None where the data has
        neither split, no labels, or labels that the model does not know.

    Raises:
        InputError: The data cannot be read.
    """
    import datasets

    try:
        rows, column, split = _rows(data, ("test", "validation"), images, exact=False)
    except InputError as error:
        if "no split" in str(error):
            return None
        raise
    labels = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    try:
        numbers = [] if labels is None else label_numbers(rows, labels, config.label2id, data)
    except InputError:
        return None
    if not numbers:
        return None
    wanted = torch.tensor(numbers)
    pixels = _pixels(rows, column, split, processor, config, data)
    return (lambda model: _accuracy(model, pixels, wanted)), len(numbers)


def _accuracy(model: Any, pixels: Tensor, wanted: Tensor) -> dict[str, float]:
    device = next(model.parameters()).device
    logits = []
    with evaluating(model), torch.no_grad():
        for batch in pixels.split(_BATCH):
            logits.append(model(pixel_values=batch.to(device, next(model.parameters()).dtype)).logits.float().cpu())
    found = torch.cat(logits)
    return {
        "accuracy": (found.argmax(-1) == wanted).double().mean().item(),
        "loss": torch.nn.functional.cross_entropy(found, wanted).item(),
    }


def _rows(data: str, splits: tuple[str, ...], count: int, exact: bool = True) -> tuple[Any, str, str]:
    from crrelu_llm.data import load_dataset

    if data == TEXT:
        raise InputError(
            f"an image model is calibrated on images, and calibration_data is {data}; set calibration_data to a "
            "folder or a data set of images, or calibration: none"
        )
    found = load_dataset(data)
    chosen = next((name for name in splits if name in found), None)
    if chosen is None:
        raise InputError(f"{data}: no split {' or '.join(splits)}; it has: {', '.join(found)}")
    rows = found[chosen]
    column = image_column(rows, data)
    if exact and len(rows) < count:
        raise InputError(
            f"{data}: {len(rows)} images, fewer than the {count} asked for; give more, or set calibration_images to "
            f"{len(rows)} or less"
        )
    count = min(count, len(rows))
    spread = [index * len(rows) // count for index in range(count)]  # rows are often sorted by their labels
    return undecoded(rows.select(spread), column, data), column, chosen


def _pixels(rows: Any, column: str, split: str, processor: Any, config: Any, data: str) -> Tensor:
    channels, found = channels_of(config), []
    for start in range(0, len(rows), _BATCH):
        entries = rows[start : start + _BATCH][column]
        images = [
            open_image(entry, channels, f"{data} ({split}): image {start + number}")
            for number, entry in enumerate(entries, 1)
        ]
        with reading(f"{data} ({split})", ours=True):
            found.append(pixels_of(processor, images))
    return torch.cat(found)
