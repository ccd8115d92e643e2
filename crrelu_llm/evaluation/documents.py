"""Functions that local task files use beside templates: pages from lines, and the metric of TruthfulQA.

lm-eval puts the source of each function into the configuration of its task, and so into the keys of results: an edit,
even of a docstring, makes `crrelu eval` compute the task again.
"""

import re
from typing import Any

import numpy as np

_TITLE = re.compile(r" = [^=].*[^=] = ")  # " = Title = "; a section has two or more signs


def wikitext_pages(lines: Any) -> Any:
    """Joins WikiText's lines into pages: each starts with its title.

    Args:
        lines: A data set with the column `text`, one line a row.

    Returns:
        A data set with the column `page`.
    """
    from datasets import Dataset

    pages: list[list[str]] = []
    for line in lines["text"]:
        # The files have a space at the ends of a line, which readers of text may strip.
        if _TITLE.fullmatch(f" {line.strip()} ") or not pages:
            pages.append([])
        pages[-1].append(f" {line.strip()} \n" if line.strip() else " \n")
    joined = ["".join(page) for page in pages]
    return Dataset.from_dict({"page": [page for page in joined if page.strip()]})


def truthful_share(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The true answers' share of the probability of all answers: TruthfulQA's mc2.

    Args:
        doc: The row, with `mc2_targets.labels`: 1 for a true answer.
        results: The log-likelihood (nats) of each answer, and whether it is the model's first choice.
    """
    likelihoods = np.array([likelihood for likelihood, _ in results])
    # Less the largest, so that not all of them vanish where a model finds every answer improbable.
    shares = np.exp(likelihoods - likelihoods.max())
    return {"acc": float(shares[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / shares.sum())}
