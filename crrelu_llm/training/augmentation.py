"""Random augmentation of training images: crops, flips, RandAugment; needs only Pillow and a random generator."""

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
    """The augmentation of every training image.

    Attributes:
        crop_padding: Black pixels added around the image before a crop of the image's own size.
        crop_scale: The least share of the image's area in a random crop; 0: no crop.
        horizontal_flip: Whether to mirror images at random, with probability 1/2.
        randaugment_ops: How many operations of RandAugment to apply one after the other.
        randaugment_magnitude: The strength of each operation, from 0 to 10.
    """

    crop_padding: int = 0
    crop_scale: float = 0.0
    horizontal_flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        """Returns the augmented image."""
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
    return image.crop((left, top, left + width, top + height))  # black outside the image


def _part(image: Image, least: float, random: np.random.Generator) -> Image:
    """A crop with a random area and an aspect ratio between 3:4 and 4:3, resized to the image's size."""
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
    """An affine map of the image; grey outside the image."""
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
