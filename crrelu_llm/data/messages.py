"""Conversations: messages with a role and a content, which is text or a list of parts."""

from typing import Any

from crrelu_llm.errors import InputError


def are_messages(value: Any) -> bool:
    """Whether `value` is a non-empty list of messages: each has a role, and a content that may be None."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def say_something(messages: list[dict[str, Any]]) -> bool:
    """Whether every message has a content, a tool call, a thought, …; otherwise a template would write "None"."""
    return all(
        any(message[key] for key in message.keys() - {"role", "content"}) or message.get("content") is not None
        for message in messages
    )


def text_of(content: Any) -> str:
    """The text of a message's content: the string itself, or the text parts of a list.

    Raises:
        InputError: The content is neither.
    """
    if content is None:  # a tool call
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    raise InputError(f"a message's content is a text or a list of parts, not {content!r:.60}")


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with string contents."""
    return [message | {"content": text_of(message.get("content"))} for message in messages]
