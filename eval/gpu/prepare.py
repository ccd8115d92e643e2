"""Prepares the measurements: the model as a directory, and data small enough to be read in a few minutes.

    prepare.py --model M --sft DATA --dpo DATA --work W [--rows N]   ->   W/model.txt, W/data/sft, W/data/dpo

If MODEL is a folder of weights-1-of-N, as made by pack.sh, the parts are joined first.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import carry

TEST_ROWS = 96
PAIRS = "builtin:pairs"
_COLUMNS = {
    "sft": ("messages", "prompt", "completion", "text", "conversations"),
    "dpo": ("prompt", "chosen", "rejected"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "sft", "dpo", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=2000, help="training rows at most")
    args = parser.parse_args()
    from crrelu_llm.errors import InputError

    work = Path(args.work)
    try:
        for kind, name in (("sft", args.sft), ("dpo", args.dpo)):
            _subset(kind, name, work / "data" / kind, args.rows)
        (work / "model.txt").write_text(_as_directory(args.model, work) + "\n")
    except (InputError, carry.Refused) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def _as_directory(model: str, work: Path) -> str:
    """Dequantises a GGUF file once for all parts; does not change any other MODEL."""
    from crrelu_llm.patching import loading
    from crrelu_llm.patching.transform import patch_checkpoint

    if any(Path(model).glob("weights-*")):
        carry.join(Path(model), work / "carried")
        found = list((work / "carried").glob("*.gguf"))
        model = str(found[0] if found else work / "carried")
    source = loading.resolve(model)
    if not loading.is_gguf(source):
        return source
    target = work / "model"
    if not target.is_dir():
        patch_checkpoint(source, None, target)
    return str(target)


def _subset(kind: str, name: str, folder: Path, rows: int) -> None:
    """Writes the first rows of a data set as train.jsonl and test.jsonl; without a test split, uses the next rows."""
    if folder.is_dir():
        return
    splits = _pairs(rows) if name == PAIRS else _splits(name)
    train = splits["train"]
    test = next((splits[key] for key in ("test", "validation") if key in splits), None)
    count = min(rows, len(train) - (0 if test is not None else TEST_ROWS))
    following = [train[index] for index in range(count, count + TEST_ROWS)] if test is None else None
    chosen = {
        "train": [train[index] for index in range(count)],
        "test": following or [test[index] for index in range(min(TEST_ROWS, rows, len(test)))],
    }
    scratch = folder.with_name(f".{folder.name}.tmp")
    scratch.mkdir(parents=True, exist_ok=True)
    for split, found in chosen.items():
        kept = [{key: row[key] for key in _COLUMNS[kind] if row.get(key)} for row in found]
        (scratch / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(scratch, folder)


def _splits(name: str) -> Any:
    from crrelu_llm.data import load_dataset

    return load_dataset(name)


def _pairs(rows: int) -> dict[str, list[dict[str, str]]]:
    """Preference pairs from the standard library's docstrings: how a text continues, and the same words shuffled."""
    generator, found = random.Random(0), {}
    for split, texts in _splits("builtin:docstrings").items():
        if split not in ("train", "test"):
            continue
        found[split] = []
        for row in texts:
            words = row["text"].split()[:64]
            if len(words) < 16:
                continue
            rest = words[8:]
            shuffled = generator.sample(rest, len(rest))
            pair = {"prompt": words[:8], "chosen": rest, "rejected": shuffled}
            found[split].append({key: " ".join(value) + " " * (key == "prompt") for key, value in pair.items()})
            if len(found[split]) == rows:
                break
    return found


if __name__ == "__main__":
    sys.exit(main())
