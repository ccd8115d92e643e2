"""Preference pairs: which of two answers a model finds more probable, with or without a reference model."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.data import load_dataset, sha256
from crrelu_llm.data.messages import are_messages, plain_messages, say_something
from crrelu_llm.data.pairs import SHP, as_pair
from crrelu_llm.data.sources import get_split
from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.measured import Measured, wins

_SHOWN = 600


class PreferenceTask:
    """A file of preference pairs.

    Attributes:
        name: What the task is called.
        rows: How many pairs will be evaluated.
        config: What decides its numbers besides the model and the data.
        data: Name, rows and SHA-256 of the pairs.
    """

    def __init__(self, name: str, path: Path | str, limit: int | None, chat: bool) -> None:
        """Reads the pairs.

        Raises:
            InputError: The file cannot be read, has no columns chosen and rejected, or a row that is no pair.
        """
        self.name = name
        self._chat = chat
        pairs = get_split(load_dataset(str(path)), "train", str(path))
        missing = {"chosen", "rejected"} - set(pairs.column_names)
        if missing and not set(pairs.column_names) >= SHP:
            raise InputError(
                f"the task {name} cannot use {path}: no column {' and '.join(sorted(missing))}; preference pairs have "
                f"prompt, chosen and rejected, or SHP's columns; this file has {', '.join(pairs.column_names)}"
            )
        self.data = [{"name": os.path.join(*Path(path).parts[-2:]), "rows": len(pairs), "sha256": sha256(pairs)}]
        self._pairs = pairs.select(range(min(limit or len(pairs), len(pairs))))
        self.rows = len(self._pairs)
        for number, row in enumerate(self._pairs, 1):
            split(row, f"the task {name} cannot use {path}: row {number}")
        self.config = {"output_type": "preference", "version": 1, "chat_template": chat, "rows": self.rows}

    def written_by(self, tokenizer: Any, model: str) -> list[tuple[str, str, str]]:
        """The pairs as a model's tokenizer writes them: context, chosen and rejected answer.

        Raises:
            InputError: A pair that its chat template does not take.
        """
        written = []
        for number, row in enumerate(self._pairs, 1):
            where = f"the task {self.name}: row {number}, written for {model}"
            with reading(where, "leave --apply_chat_template out, or mend the row"):
                written.append(render(row, tokenizer, self._chat, where))
        return written

    def run(self, lm: Any) -> Measured:
        """Evaluates a model; the items are the pairs."""
        rendered = self.written_by(lm.tokenizer, "the model")
        scores = lm.score([(context, answer) for context, *answers in rendered for answer in answers])
        logps = np.array([score for score, _, _ in scores]).reshape(-1, 2)
        tokens = np.array([count for _, count, _ in scores]).reshape(-1, 2)
        cut = sum(1 for first, second in zip(scores[::2], scores[1::2], strict=True) if first[2] or second[2])
        lengths = np.array([[len(chosen), len(rejected)] for _, chosen, rejected in rendered])
        margins, means = logps[:, 0] - logps[:, 1], logps / tokens
        items = {
            "logp_accuracy": wins(margins),
            "logp_accuracy_norm": wins(means[:, 0] - means[:, 1]),
            "logp_margin": margins,
            "longer_answer_accuracy": wins(lengths[:, 0] - lengths[:, 1]),
        }
        measured = Measured(
            {name: float(np.mean(values)) for name, values in items.items()},
            {name: values.tolist() for name, values in items.items()},
            not_finite=int(np.sum(~np.isfinite(logps).all(axis=1))),
            examples=[
                {
                    "id": index,
                    "group": "",
                    "prompt": context[-_SHOWN:],
                    "options": [chosen[:_SHOWN], rejected[:_SHOWN]],
                    "target": "0",
                    "responses": pair.tolist(),
                }
                for index, ((context, chosen, rejected), pair) in enumerate(zip(rendered, logps, strict=True))
            ],
        )
        if cut:
            measured.notes.append(f"{cut} of {self.rows} pairs are longer than the model's context and were cut")
        return measured.finish()


def against_reference(policy: dict[str, Any], reference: dict[str, Any], beta: float) -> Measured:
    """Rewards β·(log π − log π_ref), their margin, and the DPO loss −log σ(margin), of results that are on disk.

    Args:
        policy: The model's result, as `Measured.as_dict` gave it.
        reference: The reference model's result on the same pairs.
        beta: DPO's β.
    """
    logps, base = (np.array([example["responses"] for example in side["examples"]]) for side in (policy, reference))
    rewards = beta * (logps - base)
    margins = rewards[:, 0] - rewards[:, 1]
    items = {
        "reward_accuracy": wins(margins),
        "reward_margin": margins,
        "preference_loss": np.logaddexp(0.0, -margins),
    }
    return Measured(
        {name: float(np.mean(values)) for name, values in items.items()},
        {name: values.tolist() for name, values in items.items()},
    ).finish()


def split(row: dict[str, Any], where: str) -> tuple[Any, list[Any]]:
    """A row's prompt and its two answers, each a string or messages.

    Args:
        row: `prompt`, `chosen` and `rejected`; without a prompt, what the two conversations share is it. Or as SHP and
            HH-RLHF were published, or UltraFeedback (see `data.pairs`).
        where: The task and the row, for errors.

    Raises:
        InputError: A row that is no pair.
    """
    row = as_pair(row)
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    if prompt == [] or not all(answers) or (prompt is None and isinstance(answers[0], str)):
        raise InputError(f"{where}: a pair needs a prompt and two answers that are not empty")
    for side in (prompt, *answers):
        if not (side is None or isinstance(side, str) or (are_messages(side) and say_something(side))):
            raise InputError(f"{where}: a side is a text, or messages that each have the texts role and content")
    prompt, *answers = (plain_messages(side) if isinstance(side, list) else side for side in (prompt, *answers))
    if prompt is None:
        if any(isinstance(answer, str) for answer in answers):
            raise InputError(f"{where}: without a prompt, both answers must be conversations")
        same = [chosen == rejected for chosen, rejected in zip(*answers, strict=False)]
        shared = same.index(False) if False in same else len(same)
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
        if not all(answers):
            raise InputError(f"{where}: without a prompt, each conversation must go on after what the two share")
    return prompt, answers


def render(row: dict[str, Any], tokenizer: Any, chat: bool, where: str) -> tuple[str, str, str]:
    """A row as text: context, chosen and rejected answer, each answer with its end.

    Args:
        row: `prompt`, `chosen` and `rejected`, each a string or a list of messages; without a prompt, what the two
            conversations share is it.
        tokenizer: Gives the chat template and the end-of-sequence token.
        chat: Whether to apply the chat template. Without it, messages are written as "User: …" and "Assistant: …".
        where: The task and the row, for errors.

    Raises:
        InputError: A row that is no pair, or a chat template whose conversations do not start with their prompts.
    """
    prompt, answers = split(row, where)
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        replies = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
        context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = [tokenizer.apply_chat_template(messages + reply, tokenize=False) for reply in replies]
        if not all(text.startswith(context) for text in whole):
            raise InputError(f"{where}: the chat template changes a prompt once it is answered; leave it out")
        return context, whole[0][len(context) :], whole[1][len(context) :]
    end = tokenizer.eos_token or ""
    if isinstance(prompt, str):
        return prompt, *(_plain(answer, "") + end for answer in answers)  # type: ignore[return-value]
    context = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
    return f"{context}\n\nAssistant:", *(_plain(answer, " ") + end for answer in answers)  # type: ignore[return-value]


def _plain(answer: Any, before: str) -> str:
    return before + (answer if isinstance(answer, str) else "\n\n".join(message["content"] for message in answer))
