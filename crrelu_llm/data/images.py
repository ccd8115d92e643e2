"""Images and their labels as rows of a data set: finds, opens and checks them, without torchvision."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crrelu_llm.errors import InputError, reason_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Modes that Pillow converts to RGB or grey without further choices; it would clip 16 and 32 bits per channel.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_SHOWN = 8  # labels named in a message


def undecoded(split: Any, column: str, name: str) -> Any:
    """A split with images as bytes or paths, so that they are opened only when needed, with our own errors.

    Raises:
        InputError: The column holds no images.
    """
    import datasets

    kind = (split.features or {}).get(column)
    text = isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "binary")
    if not isinstance(kind, datasets.Image) and not text:
        raise InputError(f"{name}: the column {column} holds {kind}, not images; set image_column_name")
    return split.cast_column(column, datasets.Image(decode=False))


def image_column(split: Any, name: str) -> str:
    """The first column of a split that holds images.

    Raises:
        InputError: No column holds images.
    """
    import datasets

    for column, kind in (split.features or {}).items():
        if isinstance(kind, datasets.Image):
            return column
    raise InputError(f"{name}: no column holds images: found {', '.join(split.column_names or ())}; give images")


def open_image(entry: Any, channels: int, name: str) -> Image:
    """Opens an image.

    Args:
        entry: `{bytes, path}`, as returned by `undecoded`.
        channels: 3 for red, green and blue, as transformers' processors expect; 1 for grey.
        name: The name of the row for the message; the name of the file, if there is one.

    Raises:
        InputError: The image is missing or broken, or its mode has no plain conversion.
    """
    from PIL import Image

    if not isinstance(entry, dict) or (entry.get("bytes") is None and not entry.get("path")):
        raise InputError(f"{name}: there is no image; leave the row out")
    path = entry.get("path")
    if path and (entry.get("bytes") is None or Path(path).is_file()):
        name = str(path)
    try:
        with Image.open(path if entry.get("bytes") is None else io.BytesIO(entry["bytes"])) as image:
            if image.mode not in _MODES:
                raise InputError(
                    f"{name}: an image of mode {image.mode}; give 8 bits per channel (grey, RGB, or with transparency)"
                )
            return image.convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds of errors
        reason = reason_of(error).partition(" <")[0]  # without the repr of the object that was read
        raise InputError(f"{name}: cannot be read as an image: {reason}; mend it, or leave it out") from error


def label_names(split: Any, column: str, name: str) -> list[str]:
    """The labels of a split by their numbers: names from the data, else the text values, or the numbers as text.

    Raises:
        InputError: The column holds no labels.
    """
    import datasets

    kind = (split.features or {}).get(column)
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    values = split[column]
    first = next((value for value in values if value is not None), None)
    if isinstance(first, str):
        return sorted({value for value in values if value})
    if isinstance(first, int) and not isinstance(first, bool):
        return [str(number) for number in range(max(value for value in values if value is not None) + 1)]
    raise InputError(f"{name}: the column {column} holds {first!r:.40}, not labels; set label_column_name")


def label_numbers(split: Any, column: str, known: dict[str, int], name: str) -> list[int]:
    """The label of each row, as the model's number for it.

    Args:
        split: The rows.
        column: The column of the labels.
        known: The model's labels and their numbers.
        name: The name of the data, for the message.

    Raises:
        InputError: A row has no label, or a label that the model does not know.
    """
    import datasets

    kind = (split.features or {}).get(column)
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    found = []
    for number, value in enumerate(split[column], 1):
        label = value if isinstance(value, str) or names is None else None
        if label is None and isinstance(value, int) and names is not None and 0 <= value < len(names):
            label = names[value]
        place = None if label is None else known.get(str(label))
        if place is None:
            some = ", ".join(itertools.islice(known, _SHOWN)) + (", …" if len(known) > _SHOWN else "")
            what = "no label" if value in (None, -1) else f"the label {value if label is None else label}"
            raise InputError(f"{name}: row {number} has {what}, which is none of the model's: {some}")
        found.append(place)
    return found
