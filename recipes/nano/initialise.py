"""Writes the untrained nano GPT-2 (3.4 M parameters, GELU) with a tokenizer trained on the built-in corpus.

    python recipes/nano/initialise.py --output_dir nano-init

`recipes/nano/pretrain.yaml` trains the model. All text comes from this Python's own documentation; no network is used.
"""

import argparse

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from crrelu_llm.data import load_dataset, texts

END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_tokenizer(corpus, vocab_size: int = 4096, context: int = 512) -> GPT2TokenizerFast:
    """Trains a byte-level BPE tokenizer; padding has its own token, so that training does not mask the end token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False)
    return GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: 0)")
    arguments = parser.parse_args()

    tokenizer = make_tokenizer(texts(load_dataset("builtin:docstrings")["pretrain"]))
    torch.manual_seed(arguments.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=224,
        n_layer=4,
        n_head=7,
        activation_function="gelu_new",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
