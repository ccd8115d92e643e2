"""Calibration text as token ids."""

from typing import Any

from torch import Tensor

from crrelu_llm.errors import InputError

BLOCK_SIZE = 512


def calibration_blocks(data: str, tokenizer: Any, tokens: int, config: Any) -> Tensor:
    """Reads calibration text: `builtin:` data, a local file, or a hub name.

    Args:
        data: The name of the data.
        tokenizer: The model's tokenizer.
        tokens: How many tokens to read.
        config: The model's config, which limits the length of a block.

    Returns:
        Token ids, `(blocks, tokens of a block)`, int64; a last, incomplete block is dropped.

    Raises:
        InputError: The text cannot be read, is too short, or is largely unknown to the tokenizer.
    """
    from crrelu_llm.data import language_modelling_blocks

    size = min(block_size(config), tokens)
    blocks = language_modelling_blocks(data, tokenizer, tokens, size, split="calibration")
    if blocks.numel() < tokens - blocks.shape[1] + 1:
        raise InputError(
            f"{data}: {blocks.numel()} tokens of calibration text, fewer than the {tokens} asked for; give more text, "
            f"or set calibration_tokens to {blocks.numel()} or less"
        )
    check_known(blocks, tokenizer, data)
    return blocks


def check_known(blocks: Tensor, tokenizer: Any, data: str) -> None:
    """Raises InputError where more than a fifth of the tokens are the tokenizer's unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2's unknown token is its end of text, which also stands between documents
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    share = (blocks == unknown).float().mean().item()
    if share > 0.2:
        raise InputError(
            f"{data}: the tokenizer knows only {1 - share:.0%} of this text ({tokenizer.unk_token} for the rest); "
            "give text in a language of the model"
        )


def block_size(config: Any) -> int:
    """Tokens in a block of text: 512, or the context length of the model if that is less."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(BLOCK_SIZE, limit) if isinstance(limit, int) and limit > 0 else BLOCK_SIZE
