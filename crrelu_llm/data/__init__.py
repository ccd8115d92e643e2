"""Data: local files, hub names and the built-in docstrings, as `datasets` objects, plain text or token blocks."""

from crrelu_llm.data.blocks import language_modelling_blocks
from crrelu_llm.data.sources import get_split, load_dataset, sha256, texts, token_blocks

__all__ = ["get_split", "language_modelling_blocks", "load_dataset", "sha256", "texts", "token_blocks"]
