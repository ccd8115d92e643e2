"""How a text begins."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from crrelu_llm.data import token_blocks
from crrelu_llm.data.beginning import beginning
from crrelu_llm.errors import InputError


def tokenizer(template=None):
    """A tokenizer of single letters, which puts around a text what a template says."""
    names = ["<s>", "</s>", "[CLS]", "[SEP]", *"abcdef"]
    raw = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template:
        special = [(name, names.index(name)) for name in names[:4]]
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, []),
        ("<s> $A", [0]),
        ("<s> $A </s>", [0]),
        ("[CLS] $A [SEP]", [2]),
        ("$A </s>", []),
        ("<s> [CLS] $A", [0, 2]),
    ],
)
def test_it_is_what_the_tokenizer_puts_before_a_text(template, expected):
    assert beginning(tokenizer(template)) == expected


def test_every_block_begins_as_a_text_does():
    blocks = token_blocks(["abc", "def"], tokenizer("<s> $A"), 3)
    assert blocks.tolist() == [[0, 4, 5], [0, 6, 1], [0, 7, 8], [0, 9, 1]]
    assert token_blocks(["abc", "def"], tokenizer("<s> $A"), 3, limit_tokens=8).tolist() == [[0, 4, 5], [0, 6, 1]]


def test_a_block_without_room_for_text():
    with pytest.raises(InputError, match="blocks of 1 tokens have no room for text"):
        token_blocks(["abc"], tokenizer("<s> $A"), 1)
