"""Preference data in its published columns: SHP's two replies, HH-RLHF's transcripts, UltraFeedback's prompt beside
conversations that repeat the prompt. Also extracts the prompts or the better answers for other trainers."""

import re
from typing import Any

from crrelu_llm.data.messages import are_messages

SHP = frozenset({"history", "human_ref_A", "human_ref_B", "labels"})
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def holds_pairs(columns: set[str]) -> bool:
    """Whether data with these columns are preference pairs."""
    return {"chosen", "rejected"} <= columns or columns >= SHP


def parts_of_a_pair(recipe: Any, row: dict[str, Any]) -> list[str]:
    """Names of the parts of a pair."""
    return ["prompt"] * ("prompt" in row) + ["chosen", "rejected"]


def in_pairs(split: Any) -> Any:
    """Converts a split of pairs to TRL's columns, and removes repeated prompts from conversations.

    Data that TRL accepts does not change. SHP's rows become transcripts like HH-RLHF's, which need no chat template.
    """
    columns = list(split.column_names or ())
    if set(columns) >= SHP:
        return split.map(_transcript, remove_columns=columns)
    first = next(iter(split), None)
    if first is None or not with_prompt_once(first):
        return split
    return split.map(with_prompt_once, remove_columns=["prompt"])


def _transcript(row: dict[str, Any]) -> dict[str, str]:
    replies = [f" {row[name]}" for name in ("human_ref_A", "human_ref_B")]
    chosen, rejected = replies if row["labels"] == 1 else replies[::-1]
    return {"prompt": f"\n\nHuman: {row['history']}\n\nAssistant:", "chosen": chosen, "rejected": rejected}


def with_prompts(split: Any) -> Any:
    """A split of pairs, each with its prompt separate from its answers."""
    from trl.data_utils import extract_prompt

    split = in_pairs(split)
    if "prompt" in (split.column_names or ()):
        return split
    return split.map(lambda row: _cut_transcript(row) or extract_prompt(row))


def _cut_transcript(row: dict[str, Any]) -> dict[str, str] | None:
    """The common part of two transcripts that differ in the last answer; None for anything else."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str) and _TURN.match(chosen)):
        return None
    end = chosen.rfind(_ANSWER) + len(_ANSWER)
    if not rejected.startswith(chosen[:end]) or _ANSWER in rejected[end:]:
        return None
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def as_completions(split: Any) -> Any:
    """The better answer of each pair as the completion of its prompt."""
    split = with_prompts(split)
    return split.remove_columns(
        [name for name in split.column_names if name not in ("prompt", "chosen")]
    ).rename_column("chosen", "completion")


def as_prompts(split: Any) -> Any:
    """A split with a column `prompt`: the prompts of pairs, or conversations up to the last answer."""
    columns = set(split.column_names or ())
    if "prompt" in columns and not holds_pairs(columns):
        return split
    if holds_pairs(columns):
        split = with_prompts(split)
        return split.remove_columns([name for name in ("chosen", "rejected") if name in split.column_names])
    return split.map(_before_the_last_answer, remove_columns=["messages"])


def _before_the_last_answer(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    return {"prompt": messages[:-1] if messages[-1]["role"] == "assistant" else messages}


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row to `prompt`, `chosen` and `rejected`, or to two conversations without a prompt; other rows do not
    change.

    Args:
        row: A row of SHP (`history`, `human_ref_A`, `human_ref_B`, `labels`: 1 if A is preferred), of HH-RLHF
            (`chosen` and `rejected`, each a transcript of "Human:" and "Assistant:" turns), or any other.
    """
    if row.keys() >= SHP:
        replies = [[{"role": "assistant", "content": row[name]}] for name in ("human_ref_A", "human_ref_B")]
        chosen, rejected = replies if row["labels"] == 1 else replies[::-1]
        return {"prompt": [{"role": "user", "content": row["history"]}], "chosen": chosen, "rejected": rejected}
    sides = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is None and all(isinstance(side, str) and _TURN.match(side) for side in sides):
        return row | {"chosen": _messages(str(sides[0])), "rejected": _messages(str(sides[1]))}
    return row | with_prompt_once(row)


def with_prompt_once(row: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` of a row whose answers are conversations that repeat its prompt.

    With a text prompt, such as UltraFeedback's, conversations are split where they differ, as in TRL; answers without
    a prompt get it as the user's turn. Empty for rows of any other form.
    """
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if not all(are_messages(side) for side in sides):
        return {}
    if are_messages(prompt) and all(side[: len(prompt)] == prompt for side in sides):  # type: ignore[arg-type, index]
        chosen, rejected = (side[len(prompt) :] for side in sides)  # type: ignore[arg-type, index]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected} if chosen and rejected else {}
    if not isinstance(prompt, str):
        return {}
    if all(side[0]["role"] == "assistant" for side in sides):  # type: ignore[index]
        return {"prompt": [{"role": "user", "content": prompt}], "chosen": sides[0], "rejected": sides[1]}
    from trl.data_utils import extract_prompt

    return dict(extract_prompt({"chosen": sides[0], "rejected": sides[1]}))


def _messages(transcript: str) -> list[dict[str, str]]:
    """The turns of a transcript, each stripped of surrounding white space."""
    _, *parts = _TURN.split(transcript)
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
