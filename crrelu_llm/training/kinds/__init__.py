"""The kinds of training: TRL's trainers, and transformers' Trainer on images.

A new kind is one file here, with its `KIND`, and one line in `KINDS`.

A kind holds everything that differs between trainers; `kind.py` defines its attributes.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crrelu_llm.training.kinds.kind import Kind

# name of the command and of the file -> one line of help. It imports nothing, so that `crrelu --help` is fast.
KINDS = {
    "sft": "one supervised fine-tuning run (TRL's SFTTrainer) of one activation",
    "dpo": "one preference-tuning run (TRL's DPOTrainer) of one activation",
    "kto": "one run on desirable and undesirable answers (TRL's KTOTrainer) of one activation",
    "reward": "one training of a reward model (TRL's RewardTrainer) of one activation",
    "grpo": "one run on rewards of sampled answers (TRL's GRPOTrainer) of one activation",
    "rloo": "the same with TRL's RLOOTrainer",
    "image": "one training of an image classifier (transformers' Trainer) of one activation",
}


def kind_of(name: str) -> "Kind":
    """The kind of that name.

    Raises:
        KeyError: There is no such kind.
    """
    if name not in KINDS:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").KIND


def all_kinds() -> "list[Kind]":
    """Every kind, in the order of `KINDS`."""
    return [kind_of(name) for name in KINDS]
