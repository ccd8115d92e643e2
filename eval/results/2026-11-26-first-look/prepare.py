"""Makes the training and held-out files of the two SmolLM2 comparisons from the published data sets.

python prepare.py DATA_DIR MODEL
"""

import gzip
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

data, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
TOKENS = 128  # of the longer side of a pair: nothing is cut off


def rows(name):
    with gzip.open(data / name, "rt") as lines:
        return [json.loads(line) for line in lines]


def write(name, kept):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(name, len(kept))


def short(row):
    sides = (row["prompt"] + row[side] for side in ("chosen", "rejected"))
    return max(len(tokenizer.apply_chat_template(side)["input_ids"]) for side in sides) <= TOKENS


write("dolly/train.jsonl", rows("dolly-open-qa/train.jsonl.gz"))
write("dolly/test.jsonl", rows("dolly-open-qa/eval.jsonl.gz")[:96])
write("hh/train.jsonl", [row for row in rows("hh-harmless/train.jsonl.gz") if short(row)])
write("hh/test.jsonl", [row for row in rows("hh-harmless/eval.jsonl.gz") if short(row)][:64])
