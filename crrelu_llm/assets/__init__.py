"""The files that travel with the package: the nano GPT-2 and its model card."""

from importlib.resources import files
from pathlib import Path


def nano_path() -> Path:
    """Returns the folder of the embedded nano GPT-2, which `from_pretrained` loads (`builtin:nano` in recipes)."""
    return Path(str(files(__name__) / "nano"))
