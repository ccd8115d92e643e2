"""Makes the calibration text (equal parts of novels, short answers and chat) and the two texts to measure on."""

import gzip
import json
import random
import sys
from pathlib import Path

data = Path(sys.argv[1])


def rows(name):
    with gzip.open(data / name, "rt") as lines:
        return [json.loads(line) for line in lines]


def joined(messages):
    return "\n\n".join(message["content"] for message in messages)


def write(name, texts):
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


sources = [
    [row["text"] for row in rows("gutenberg-novels/train.jsonl.gz")],
    [joined(row["messages"]) for row in rows("dolly-open-qa/train.jsonl.gz")],
    [joined(row["messages"]) for row in rows("oasst-en100/sft-train.jsonl.gz")],
]
generator = random.Random(0)
for source in sources:
    generator.shuffle(source)
# Any beginning of the file has as many characters of each source.
used, mixed = [0, 0, 0], []
while sum(used) < 600_000:
    index = used.index(min(used))
    text = sources[index].pop(0)
    used[index] += len(text)
    mixed.append(text)
write("calibration.jsonl", mixed)
write("hh.jsonl", [joined(row["prompt"] + row["chosen"]) for row in rows("hh-harmless/eval.jsonl.gz")])
write("lambada.jsonl", [row["text"] for row in rows("lambada/test.jsonl.gz")])
