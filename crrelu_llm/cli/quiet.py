"""Less output from libraries in commands that run many trainings: no bars and hints for each small step."""

import os


def quieten_libraries() -> None:
    """Turns off the bars of loading, saving and mapping, and the libraries' hints; this package's warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
