"""The embedded nano GPT-2: it loads offline, is small, documented, and has learnt English."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from crrelu_llm.assets import nano_path
from crrelu_llm.data import load_dataset, texts, token_blocks

WEIGHTS_LIMIT = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano_path(), local_files_only=True)


@pytest.fixture(scope="module")
def nano():
    return AutoModelForCausalLM.from_pretrained(nano_path(), dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def perplexity(model, blocks):
    return math.exp(
        sum(model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks) / len(blocks)
    )


def test_files():
    weights = nano_path() / "model.safetensors"
    assert weights.stat().st_size <= WEIGHTS_LIMIT
    card = (nano_path() / "README.md").read_text(encoding="utf-8")
    for word in ("license: apache-2.0", "builtin:docstrings", "recipes/nano/pretrain.yaml", "perplexity", "PSF"):
        assert word in card


def test_configuration(nano, tokenizer):
    assert isinstance(nano, GPT2LMHeadModel)
    assert nano.config.activation_function == "gelu_new"
    assert AutoModelForCausalLM.from_pretrained(nano_path()).dtype == torch.bfloat16
    assert len(tokenizer) == nano.config.vocab_size
    assert tokenizer.eos_token_id == nano.config.eos_token_id == nano.generation_config.eos_token_id
    assert tokenizer.pad_token_id == nano.config.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_keeps_any_text(tokenizer):
    text = "Return the naïve\n\tvalue – 数 🙂 <|pad|"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + "So." + tokenizer.eos_token


def test_it_has_learnt(nano, tokenizer):
    split = load_dataset("builtin:docstrings")["test"]
    blocks = token_blocks(texts(split), tokenizer, 256, limit_tokens=4096)
    torch.manual_seed(0)
    untrained = perplexity(GPT2LMHeadModel(nano.config).float().eval(), blocks)
    trained = perplexity(nano, blocks)
    # 128 with Python 3.11; other versions document other things, and untrained weights come out near 4096
    assert trained < 180 < untrained
