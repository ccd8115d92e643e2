"""Where the shipped recipes are: in a checkout or editable install, and inside an installed wheel."""

from pathlib import Path


def recipes_dir() -> Path:
    """Returns the folder of the shipped recipes.

    A wheel carries the repository's top-level `recipes/` as `crrelu_llm/recipes/`; in a checkout or an editable
    install it lies beside the package.

    Raises:
        FileNotFoundError: the installation is broken: neither folder exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no recipes in {package} or beside it: the installation is incomplete, install it again")
