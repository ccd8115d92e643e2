"""Preference pairs: the more probable of two answers, with or without a reference model."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from crrelu_llm.data import load_dataset, sha256
from crrelu_llm.data.messages import are_messages, plain_messages, say_something
from crrelu_llm.data.pairs import SHP, as_pair
from crrelu_llm.data.sources import get_split
from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.measured import SHOWN, Item, Measured, wins
from crrelu_llm.report.schema import Data


class PreferenceTask:
    """A file of preference pairs, with the attributes of a `HarnessTask`."""

    def __init__(self, name: str, path: Path | str, limit: int | None, chat: bool) -> None:
        """Reads the pairs.

        Raises:
            InputError: The file cannot be read, lacks a column, or has a row that is not a pair.
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
        self.data = [Data(name=os.path.join(*Path(path).parts[-2:]), rows=len(pairs), sha256=sha256(pairs))]
        self._pairs = pairs.select(range(min(limit or len(pairs), len(pairs))))
        self.rows = len(self._pairs)
        for number, row in enumerate(self._pairs, 1):
            split(row, f"the task {name} cannot use {path}: row {number}")
        self.config = {"output_type": "preference", "version": 1, "chat_template": chat, "rows": self.rows}

    def rendered_for(self, tokenizer: Any, model: str) -> list[tuple[str, str, str]]:
        """The pairs rendered for a model's tokenizer: context, chosen and rejected answer.

        Raises:
            InputError: The chat template refuses a pair.
        """
        written = []
        for number, row in enumerate(self._pairs, 1):
            where = f"the task {self.name}: row {number}, rendered for {model}"
            with reading(where, "leave out --apply_chat_template, or correct the row"):
                written.append(render(row, tokenizer, self._chat, where))
        return written

    def run(self, lm: Any) -> Measured:
        """Evaluates a model; the items are the pairs."""
        rendered = self.rendered_for(lm.tokenizer, "the model")
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
        note = f"{cut} of {self.rows} pairs are longer than the model's context and were truncated"
        return Measured(
            metrics={name: float(np.mean(values)) for name, values in items.items()},
            items={name: values.tolist() for name, values in items.items()},
            examples=[
                Item(
                    id=index,
                    group="",
                    prompt=context[-SHOWN:],
                    options=[chosen[:SHOWN], rejected[:SHOWN]],
                    target="0",
                    responses=pair.tolist(),
                )
                for index, ((context, chosen, rejected), pair) in enumerate(zip(rendered, logps, strict=True))
            ],
            notes=[note] if cut else [],
            not_finite=int(np.sum(~np.isfinite(logps).all(axis=1))),
        ).with_intervals()


def against_reference(policy: Measured, reference: Measured, beta: float) -> Measured:
    """The accuracy and margin of rewards β·(log π − log π_ref), and the DPO loss −log σ(margin), from two results.

    Args:
        policy: The result of the model.
        reference: The result of the reference model on the same pairs.
        beta: DPO's β.
    """
    logps, base = (np.array([item.responses for item in side.examples], dtype=float) for side in (policy, reference))
    rewards = beta * (logps - base)
    margins = rewards[:, 0] - rewards[:, 1]
    items = {
        "reward_accuracy": wins(margins),
        "reward_margin": margins,
        "preference_loss": np.logaddexp(0.0, -margins),
    }
    return Measured(
        metrics={name: float(np.mean(values)) for name, values in items.items()},
        items={name: values.tolist() for name, values in items.items()},
    ).with_intervals()


def split(row: dict[str, Any], where: str) -> tuple[Any, list[Any]]:
    """The prompt of a row and its two answers, each a string or messages.

    Args:
        row: `prompt`, `chosen` and `rejected`; without a prompt, the common beginning of the two conversations is the
            prompt. Or a row in the published format of SHP, HH-RLHF or UltraFeedback (see `data.pairs`).
        where: The task and the row, for errors.

    Raises:
        InputError: The row is not a pair.
    """
    row = as_pair(row)
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    if prompt == [] or not all(answers) or (prompt is None and isinstance(answers[0], str)):
        raise InputError(f"{where}: a pair needs a prompt and two answers that are not empty")
    for side in (prompt, *answers):
        if not (side is None or isinstance(side, str) or (are_messages(side) and say_something(side))):
            raise InputError(f"{where}: a prompt or an answer is a text, or messages with the texts role and content")
    prompt, *answers = (plain_messages(side) if isinstance(side, list) else side for side in (prompt, *answers))
    if prompt is None:
        if any(isinstance(answer, str) for answer in answers):
            raise InputError(f"{where}: without a prompt, both answers must be conversations")
        same = [chosen == rejected for chosen, rejected in zip(*answers, strict=False)]
        shared = same.index(False) if False in same else len(same)
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
        if not all(answers):
            raise InputError(f"{where}: without a prompt, each conversation must go on after their common beginning")
    return prompt, answers


def render(row: dict[str, Any], tokenizer: Any, chat: bool, where: str) -> tuple[str, str, str]:
    """A row as text: context, chosen and rejected answer, each answer with the end-of-sequence token.

    Args:
        row: As for `split`.
        tokenizer: Has the chat template and the end-of-sequence token.
        chat: Whether to apply the chat template. Without it, messages are rendered as "User: …" and "Assistant: …".
        where: The task and the row, for errors.

    Raises:
        InputError: The row is not a pair, or the rendered conversation does not start with the rendered prompt.
    """
    prompt, answers = split(row, where)
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        replies = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
        context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = [tokenizer.apply_chat_template(messages + reply, tokenize=False) for reply in replies]
        if not all(text.startswith(context) for text in whole):
            raise InputError(
                f"{where}: the chat template changes a prompt when an answer follows; leave out --apply_chat_template"
            )
        return context, whole[0][len(context) :], whole[1][len(context) :]
    end = tokenizer.eos_token or ""
    if isinstance(prompt, str):
        return prompt, *(_plain(answer, "") + end for answer in answers)  # type: ignore[return-value]
    context = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
    return f"{context}\n\nAssistant:", *(_plain(answer, " ") + end for answer in answers)  # type: ignore[return-value]


def _plain(answer: Any, before: str) -> str:
    return before + (answer if isinstance(answer, str) else "\n\n".join(message["content"] for message in answer))
