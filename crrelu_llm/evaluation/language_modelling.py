"""Language modelling on any text: loss and perplexity per token, and bits per byte, with a value for each document."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from crrelu_llm.data import load_dataset, sha256
from crrelu_llm.data.sources import texts
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.lm import quiet
from crrelu_llm.evaluation.measured import SHOWN, Item, Measured, exponential, linearised, shares_of
from crrelu_llm.evaluation.sparsity import sparsity
from crrelu_llm.report.schema import Data

_PIECE = 3000  # the characters of a document that is made of lines of a text file


class TextTask:
    """A file of text, with the attributes of a `HarnessTask`."""

    def __init__(self, name: str, path: Path | str, limit: int | None) -> None:
        """Reads the documents: the rows of a data file, or pieces of about 3000 characters of a text file.

        Raises:
            InputError: The file cannot be read, or contains no text.
        """
        self.name = name
        splits = load_dataset(str(path))
        # builtin:docstrings has a test split
        split = splits["test"] if "test" in splits else next(iter(splits.values()))
        documents = list(pieces(split["text"]) if _is_lines(str(path)) else texts(split))
        if not documents:
            raise InputError(f"the task {name}: {path} contains no text")
        rows = [{"text": document} for document in documents]
        self.data = [Data(name=os.path.join(*Path(path).parts[-2:]), rows=len(rows), sha256=sha256(rows))]
        self._documents = documents[:limit]
        self.rows = len(self._documents)
        self.config = {"output_type": "language_modelling", "version": 2, "rows": self.rows}

    def run(self, lm: Any) -> Measured:
        """Evaluates a model; the items are the documents. The share of zeros is that of the first documents."""
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=index)
            for index, text in enumerate(self._documents)
        ]
        with quiet():
            nll = -np.array(lm.loglikelihood_rolling(requests))
        tokens = np.array([lm.tokens_of(text) for text in self._documents])
        size = np.array([len(text.encode("utf-8", "surrogatepass")) for text in self._documents])
        loss = float(nll.sum() / tokens.sum())
        return Measured(
            metrics={
                "bits_per_byte": float(nll.sum() / size.sum() / math.log(2)),
                "loss": loss,
                "perplexity": exponential(loss),
            },
            items={"bits_per_byte": linearised(nll / math.log(2), size), "loss": linearised(nll, tokens)},
            shares={"bits_per_byte": shares_of(nll / math.log(2), size), "loss": shares_of(nll, tokens)},
            per_token=["loss", "perplexity"],
            not_finite=int(np.sum(~np.isfinite(nll))),
            sparsity=sparsity(lm.model, (lm.tokenizer(text)["input_ids"] for text in self._documents)),
            examples=[
                Item(id=index, group="", prompt=text[:SHOWN], options=[], target="", responses=[-float(value)])
                for index, (text, value) in enumerate(zip(self._documents, nll, strict=True))
            ],
        ).with_intervals()


def pieces(lines: Iterable[str]) -> Iterable[str]:
    """Joins lines into documents of about 3000 characters, which end at empty lines if there are any."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size = size + len(line) if len(held) > 1 else len(line)
        if size >= (2 * _PIECE if line.strip() else _PIECE):
            yield "\n".join(held).strip()
            held = []
    if any(line.strip() for line in held):
        yield "\n".join(held).strip()


def _is_lines(path: str) -> bool:
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix in (".txt", ".text")
