"""Where the shipped YAML files are: in a checkout or editable install, and inside an installed wheel."""

from pathlib import Path


def recipes_dir() -> Path:
    """Returns the folder of the shipped recipes.

    Raises:
        FileNotFoundError: The installation is broken: the folder does not exist.
    """
    return _shipped("recipes")


def eval_dir() -> Path:
    """Returns the folder that holds the shipped `suites/` and `tasks/`.

    Raises:
        FileNotFoundError: The installation is broken: the folder does not exist.
    """
    return _shipped("eval")


def _shipped(name: str) -> Path:
    """A wheel carries the repository's top-level folder inside the package; in a checkout it lies beside it."""
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no {name} in {package} or beside it: the installation is incomplete, install it again")
