"""Shows at which tokens of a document two models differ: the chat template's first tokens, its last one, or the rest.

    python positions.py BASELINE CANDIDATE DATA OUTPUT.json [--first 4] [--max_length 128]

BASELINE and CANDIDATE are checkpoints, DATA conversations as JSON lines. For each of the first predicted tokens, for
the last one of documents that are not cut, and for all others: the mean loss of both models and the mean difference,
for one token and summed over a document. Prints a table and writes it as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import crrelu_llm  # noqa: F401  (loads patched checkpoints)
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("baseline", "candidate"):
        parser.add_argument(name)
    for name in ("data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--first", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    args = parser.parse_args()
    try:
        tokenizer = loading.load_tokenizer(args.baseline)
        documents = [
            tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
            for line in args.data.read_text().splitlines()
        ]
        cut = [document[: args.max_length] for document in documents]
        losses = [token_losses(loading.load_model(path).eval(), cut) for path in (args.baseline, args.candidate)]
    except (InputError, OSError) as error:
        parser.error(str(error))
    ends = [len(document) <= args.max_length for document in documents]
    found = by_position(*losses, ends, args.first)
    for entry in found[: args.first]:
        position = int(entry["tokens"])
        entry["text"] = (
            tokenizer.decode([cut[0][position]]) if len({tuple(d[: position + 1]) for d in cut}) == 1 else ""
        )
    print("| tokens | baseline | candidate | difference a token | difference a document |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for entry in found:
        numbers = [f"{entry[key]:.4f}" for key in ("baseline", "candidate", "difference", "a_document")]
        print(f"| {entry['tokens']} {entry.get('text', '')!r} | {' | '.join(numbers)} |")
    args.output.write_text(json.dumps(found, indent=2) + "\n")


def token_losses(model: nn.Module, documents: list[list[int]]) -> list[Tensor]:
    """The loss of each predicted token of each document, in nats: `(tokens − 1,)` each."""
    found = []
    for document in tqdm(documents, desc="Documents"):
        ids = torch.tensor([document])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double())
    return found


def by_position(baseline: list[Tensor], candidate: list[Tensor], ends: list[bool], first: int) -> list[dict[str, Any]]:
    """The means at each of the `first` predicted tokens, at the last one of whole documents, and at the others.

    Args:
        baseline: The losses of each document's tokens; `candidate` likewise.
        ends: Whether each document is whole.
        first: How many of the first predicted tokens are shown separately.
    """
    parts: dict[str, list[tuple[float, float]]] = {str(position + 1): [] for position in range(first)}
    parts |= {"last": [], "others": []}
    for before, after, whole in zip(baseline, candidate, ends, strict=True):
        for position, pair in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            last = whole and position == len(before) - 1
            parts["last" if last else str(position + 1) if position < first else "others"].append(pair)
    found = []
    for name, pairs in parts.items():
        if pairs:
            means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
            total = sum(after - before for before, after in pairs)
            found.append(
                {"tokens": name, "count": len(pairs), "baseline": means[0], "candidate": means[1]}
                | {"difference": means[1] - means[0], "a_document": total / len(baseline)}
            )
    return found


if __name__ == "__main__":
    main()
