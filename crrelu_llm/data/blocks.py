"""Text for calibration and perplexity: any data name as equal blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from crrelu_llm.data.sources import load_dataset, texts, token_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def language_modelling_blocks(
    name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, block_size: int, split: str
) -> torch.Tensor:
    """Loads a data set by name and cuts its text into blocks.

    Args:
        name: what `load_dataset` takes. A plain text file is one document, not one for each line.
        tokenizer: the model's tokenizer; blocks are no longer than what it says the model can read.
        tokens: the most tokens to use.
        block_size: tokens in a block.
        split: the split to take; the first of test, validation and train where there is no such split.

    Returns:
        Token ids of shape (blocks, block_size), int64.

    Raises:
        InputError: if the data cannot be read, has no text, or is shorter than one block.
    """
    block_size = min(block_size, tokenizer.model_max_length, tokens)
    return token_blocks(_documents(name, split), tokenizer, block_size, tokens)


def _documents(name: str, split: str) -> Iterable[str]:
    suffixes = set(Path(name).suffixes)
    if Path(name).is_file() and suffixes & {".txt", ".text"}:
        import datasets

        rows = datasets.load_dataset("text", data_files=name, sample_by="document", split="train")
        return rows["text"]
    splits = load_dataset(name)
    chosen = next((key for key in (split, "test", "validation", "train") if key in splits), next(iter(splits)))
    return texts(splits[chosen])
