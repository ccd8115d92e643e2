"""Images and their labels as rows of a data set: found, opened, checked; nothing of torchvision is used."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crrelu_llm.errors import InputError, reason_of

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow turns into RGB or grey without a choice of ours; 16 and 32 bits a channel it would cut off.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_SHOWN = 8  # labels named in a message


def undecoded(split: Any, column: str, name: str) -> Any:
    """A split whose images are bytes or paths, opened only where they are wanted, with an error of our own.

    Raises:
        InputError: The column holds no images.
    """
    import datasets

    kind = (split.features or {}).get(column)
    text = isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "binary")
    if not isinstance(kind, datasets.Image) and not text:
        raise InputError(f"{name}: the column {column} holds no images but {kind}; set image_column_name")
    return split.cast_column(column, datasets.Image(decode=False))


def image_column(split: Any, name: str) -> str:
    """The first column of a split that holds images.

    Raises:
        InputError: There is none.
    """
    import datasets

    for column, kind in (split.features or {}).items():
        if isinstance(kind, datasets.Image):
            return column
    raise InputError(f"{name}: no column holds images: found {', '.join(split.column_names or ())}; give images")


def open_image(entry: Any, channels: int, name: str) -> Image:
    """Opens an image.

    Args:
        entry: `{bytes, path}`, as `undecoded` leaves it.
        channels: 3: of red, green and blue, as transformers' processors want them; 1: grey.
        name: Of the row, for the message; of a file it is the file's.

    Raises:
        InputError: There is none, it is broken, or of a mode that has no plain conversion.
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
                    f"{name}: an image of mode {image.mode}; give 8 bits a channel (grey, RGB, or with transparency)"
                )
            return image.convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise what they like
        reason = reason_of(error).partition(" <")[0]  # of the object that was read
        raise InputError(f"{name}: cannot be read as an image: {reason}; mend it, or leave it out") from error


def label_names(split: Any, column: str, name: str) -> list[str]:
    """The labels of a split by their numbers: those that the data names, else the texts or the numbers as texts.

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
    raise InputError(f"{name}: the column {column} holds no labels but {first!r:.40}; set label_column_name")


def label_numbers(split: Any, column: str, known: dict[str, int], name: str) -> list[int]:
    """The label of each row as the model's number of it.

    Args:
        split: The rows.
        column: Of the labels.
        known: The model's labels and their numbers.
        name: Of the data, for the message.

    Raises:
        InputError: A row without a label, or with one that the model does not know.
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
