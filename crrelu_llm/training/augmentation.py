"""Images changed at random while they are trained on: crops, flips, RandAugment. Pillow alone; a generator decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

HIGHEST = 10.0  # magnitude of RandAugment
_GREY = 128
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """What is done to every training image.

    Attributes:
        crop_padding: Pixels of black around the image, of which a part of the image's own size is cut out.
        crop_scale: The least share of the image's area that is cut out and shown; 0: all of it.
        horizontal_flip: Whether every other image is mirrored.
        randaugment_ops: How many operations of RandAugment follow each other.
        randaugment_magnitude: How strong each is, from 0 to 10.
    """

    crop_padding: int = 0
    crop_scale: float = 0.0
    horizontal_flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """The image as `random` changes it."""
        if self.crop_padding:
            image = _padded_crop(image, self.crop_padding, random)
        if self.crop_scale:
            image = _part(image, self.crop_scale, random)
        if self.horizontal_flip and random.random() < 0.5:
            image = _mirrored(image)
        names = list(_OPERATIONS)
        for _ in range(self.randaugment_ops):
            image = _OPERATIONS[names[random.integers(len(names))]](
                image, self.randaugment_magnitude / HIGHEST, 1 if random.random() < 0.5 else -1
            )
        return image


def _padded_crop(image: Image, padding: int, random: np.random.Generator) -> Image:
    left, top = (int(random.integers(-padding, padding + 1)) for _ in range(2))
    width, height = image.size
    return image.crop((left, top, left + width, top + height))  # what is outside is black


def _part(image: Image, least: float, random: np.random.Generator) -> Image:
    """A part of random area and of a ratio of sides between 3:4 and 4:3, in the image's size."""
    from PIL.Image import Resampling

    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * random.uniform(least, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(width - w + 1), random.integers(height - h + 1)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            return image.resize((width, height), Resampling.BICUBIC, box)
    return image


def _mirrored(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _moved(image: Image, matrix: tuple[float, float, float, float, float, float]) -> Image:
    """An affine map of the image; what comes in from outside is grey."""
    from PIL.Image import Resampling, Transform

    fill = _GREY if image.mode == "L" else (_GREY,) * 3
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR, fillcolor=fill)


def _rotated(image: Image, strength: float, sign: int) -> Image:
    angle = math.radians(30 * strength * sign)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _moved(image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


def _enhanced(name: str) -> Callable[[Image, float, int], Image]:
    def change(image: Image, strength: float, sign: int) -> Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * strength * sign)

    return change


def _of_histogram(name: str, amount: Callable[[float], tuple[int, ...]] = lambda strength: ()) -> Callable:
    def change(image: Image, strength: float, sign: int) -> Image:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image, *amount(strength))

    return change


# The 14 operations of RandAugment (Cubuk et al., 2020), each with its range at magnitude 10.
_OPERATIONS: dict[str, Callable[[Image, float, int], Image]] = {
    "identity": lambda image, strength, sign: image,
    "autocontrast": _of_histogram("autocontrast"),
    "equalize": _of_histogram("equalize"),
    "rotate": _rotated,
    "solarize": _of_histogram("solarize", lambda strength: (256 - round(256 * strength),)),
    "color": _enhanced("Color"),
    "posterize": _of_histogram("posterize", lambda strength: (8 - round(4 * strength),)),
    "contrast": _enhanced("Contrast"),
    "brightness": _enhanced("Brightness"),
    "sharpness": _enhanced("Sharpness"),
    "shear_x": lambda image, strength, sign: _moved(image, (1, 0.3 * strength * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: _moved(image, (1, 0, 0, 0.3 * strength * sign, 1, 0)),
    "translate_x": lambda image, strength, sign: _moved(image, (1, 0, 0.45 * image.width * strength * sign, 0, 1, 0)),
    "translate_y": lambda image, strength, sign: _moved(image, (1, 0, 0, 0, 1, 0.45 * image.height * strength * sign)),
}
