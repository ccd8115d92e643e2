"""Small data for the local suite, in the layout that eval/README.md gives; likelihoods worked out by hand."""

import gzip
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["class", "module", "string", "list", "number", "value", "method", "name", "file", "error", "import", "text"]


def sentence(seed, length=6):
    """Words in an order that `seed` decides."""
    return " ".join(WORDS[(seed * 7 + index * (seed + 3)) % len(WORDS)] for index in range(length))


def write(path, rows):
    """Rows as gzipped JSON lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def pairs(count=6):
    """Preference pairs, conversational."""
    return [
        {
            "prompt": [{"role": "user", "content": sentence(i)}],
            "chosen": [{"role": "assistant", "content": sentence(i + 1, 3 + i % 3)}],
            "rejected": [{"role": "assistant", "content": sentence(i + 5, 4)}],
        }
        for i in range(count)
    ]


def arc(count=6):
    """Multiple-choice questions."""
    return [
        {
            "question": sentence(i),
            "choices": {"text": [sentence(i + k, 1 + k) for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(count)
    ]


def blimp():
    """Minimal pairs of three paradigms, 4 of each, one paradigm after the other."""
    return [
        {"uid": f"paradigm_{p}", "field": "f", "sentence_good": sentence(p + i), "sentence_bad": sentence(p + i + 2)}
        for p in range(3)
        for i in range(4)
    ]


def write_all(folder):
    """A data_dir for the tasks arc_easy, blimp, lambada_openai, wikitext and hh_harmless."""
    folder = Path(folder)
    write(folder / "arc-easy" / "test.jsonl.gz", arc())
    write(folder / "blimp" / "blimp.jsonl.gz", blimp())
    write(folder / "lambada" / "test.jsonl.gz", [{"text": sentence(i, 8)} for i in range(5)])
    write(folder / "hh-harmless" / "eval.jsonl.gz", pairs())
    (folder / "wikitext-2").mkdir()
    with gzip.open(folder / "wikitext-2" / "valid.txt.gz", "wt") as file:
        for page in range(3):
            file.write(
                f" \n = Page {page} = \n \n {sentence(page, 12)} , it said . \n \n = = Part = = \n \n {sentence(9)} \n"
            )
    return folder


def language_model(directory, batch_size=4, max_length=None):
    """The language model that lm-eval asks, of a checkpoint."""
    from crrelu_llm.evaluation.lm import build

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return build(model, AutoTokenizer.from_pretrained(directory), batch_size, torch.device("cpu"), max_length)


def by_hand(directory, ids, start):
    """Log-probability of `ids[start:]` after `ids[:start]`, one text by itself."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[1:, None])[start - 1 :].sum().item()


def prepared(name, data_dir, limit=None, chat=False):
    """A task of the local suite; lm-eval is imported here, since not all that need the data need it."""
    from crrelu_llm.evaluation.harness import HarnessTask, manager_for
    from crrelu_llm.evaluation.suites import read_suite

    (spec,) = read_suite("local", [name])
    return HarnessTask(spec, data_dir, limit, chat, manager_for([spec]))
