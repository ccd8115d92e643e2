"""Silence while other libraries talk."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


def quieten_libraries() -> None:
    """Turns off the bars of loading, saving and mapping, and the hints of the libraries, for a whole command.

    The warnings of this package stay.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what the exporters, and the libraries below them, say of each of their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
