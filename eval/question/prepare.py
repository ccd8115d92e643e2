"""Makes the files of the study from the published data sets: SFT tasks, DPO tasks, the calibration text.

    python prepare.py DATA_DIR OUTPUT_DIR

All models get the same rows. DPO uses only pairs that fit completely into the recipe's max_length, because a truncated
pair is a different pair; the trainer truncates SFT conversations. Held-out rows come from the published evaluation
files (for OpenAssistant: one conversation from each of 40 trees not used in training), sorted by length, so that
batches need little padding.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SFT_ROWS, DPO_ROWS, HELD_OUT, HELD_OUT_TREES = 1000, 320, 128, 40
LONGEST_PAIR = 500  # characters of a prompt and its longer answer: about 125 tokens
CALIBRATION_CHARACTERS = 200_000


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output_dir", type=Path)
    args = parser.parse_args()

    def rows(name: str) -> list[Row]:
        with gzip.open(args.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    for name, (train, test, take) in {
        "dolly": ("dolly-open-qa/train", "dolly-open-qa/eval", _messages),
        "answers": ("dolly-open-qa/train", "dolly-open-qa/eval", _completion),  # the loss covers the answers alone
        "gsm8k": ("gsm8k/train", "gsm8k/eval", _question),
    }.items():
        _split(args.output_dir / name, rows(train), rows(test), take)
    chats, held_out = _trees(rows("oasst-en100/sft-train") + rows("oasst-en100/sft-eval"))
    _split(args.output_dir / "oasst", chats, held_out, _messages)
    for name, folder in {"hh": "hh-harmless", "pandalm": "pandalm-human-prefs", "alpaca": "alpaca-eval-prefs"}.items():
        _split(args.output_dir / name, rows(f"{folder}/train"), rows(f"{folder}/eval"), _short_pair, DPO_ROWS)
    novels = [row["text"] for row in rows("gutenberg-novels/train")]
    conversations = [
        ["\n\n".join(message["content"] for message in row["messages"]) for row in part]
        for part in (rows("dolly-open-qa/train"), chats)
    ]
    _write(args.output_dir / "calibration.jsonl", [{"text": text} for text in _mixed(novels, *conversations)])


def _split(
    directory: Path, train: list[Row], test: list[Row], take: Callable[[Row], Row | None], most: int = SFT_ROWS
) -> None:
    kept = [[row for row in map(take, part) if row is not None] for part in (train, test)]
    random.Random(0).shuffle(kept[0])
    _write(directory / "train.jsonl", kept[0][:most])
    _write(directory / "test.jsonl", sorted(kept[1][:HELD_OUT], key=lambda row: len(json.dumps(row))))


def _trees(threads: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training threads, and the best thread of each held-out tree; a tree is not split, as its threads start alike."""
    held_out = set(random.Random(0).sample(sorted({row["tree"] for row in threads}), HELD_OUT_TREES))
    best: dict[str, Row] = {}
    for row in sorted(threads, key=lambda row: float("inf") if row["leaf_rank"] is None else row["leaf_rank"]):
        if row["tree"] in held_out:
            best.setdefault(row["tree"], row)
    return [row for row in threads if row["tree"] not in held_out], list(best.values())


def _messages(row: Row) -> Row:
    return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}


def _completion(row: Row) -> Row:
    messages = _messages(row)["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _question(row: Row) -> Row:
    turns = (("user", row["question"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _short_pair(row: Row) -> Row | None:
    characters = [
        sum(len(message["content"]) for message in row["prompt"] + row[side]) for side in ("chosen", "rejected")
    ]
    return {key: row[key] for key in ("prompt", "chosen", "rejected")} if max(characters) <= LONGEST_PAIR else None


def _mixed(*sources: list[str]) -> list[str]:
    """Texts of all sources in turn, so that any prefix has about the same number of characters of each source."""
    generator = random.Random(0)
    for source in sources:
        generator.shuffle(source)
    used, texts = [0] * len(sources), []
    while sum(used) < CALIBRATION_CHARACTERS and (source := sources[used.index(min(used))]):
        texts.append(source.pop(0))
        used[used.index(min(used))] += len(texts[-1])
    return texts


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(path, len(rows))


if __name__ == "__main__":
    main()
