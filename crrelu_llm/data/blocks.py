"""Text for calibration and perplexity: loads a data set by name as equal blocks of token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crrelu_llm.data.sources import load_dataset, texts, token_blocks
from crrelu_llm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FALLBACKS = {"calibration": ("train", "validation"), "test": ("validation", "train")}


def language_modelling_blocks(
    name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, block_size: int, split: str
) -> torch.Tensor:
    """Loads a data set by name and cuts its text into blocks.

    Args:
        name: as for `load_dataset`. A plain text file is one document, not one per line.
        tokenizer: the model's tokenizer; blocks are at most as long as its maximum length.
        tokens: the most tokens to use.
        block_size: tokens in a block.
        split: `calibration` or `test`. If that split is missing, calibration text comes from train, so that a model is
            never evaluated on it; evaluation text comes from validation, then train.

    Returns:
        Token ids of shape (blocks, block_size), int64.

    Raises:
        InputError: if the data cannot be read, has no text, or is shorter than one block.
    """
    block_size = min(block_size, tokenizer.model_max_length, tokens)
    return token_blocks(_documents(name, split), tokenizer, block_size, tokens)


def is_calibration_text(calibration: str, test: str) -> bool:
    """Whether the text that evaluates a model is the text that calibrates it."""
    if calibration != test:
        return False
    if _is_plain(Path(test).expanduser()):
        return True
    splits = load_dataset(test)
    return _split(splits, "calibration") == _split(splits, "test")


def _is_plain(path: Path) -> bool:
    return path.is_file() and re.search(r"\.(txt|text)(\.gz|\.zst)?$", path.name) is not None


def _split(splits: Mapping[str, Any], wanted: str) -> str | None:
    return next((key for key in (wanted, *_FALLBACKS[wanted]) if key in splits), None)


def _documents(name: str, split: str) -> Iterable[str]:
    path = Path(name).expanduser()
    if _is_plain(path):
        import datasets

        try:
            return datasets.load_dataset("text", data_files=str(path), sample_by="document", split="train")["text"]
        except datasets.exceptions.DatasetGenerationError as error:
            raise InputError(f"{name}: cannot be read as text: {error.__cause__ or error}") from error
    splits = load_dataset(name)
    chosen = _split(splits, split)
    if chosen is None:
        raise InputError(f"{name}: no split to take {split} text from; it has: {', '.join(splits)}")
    return texts(splits[chosen])
