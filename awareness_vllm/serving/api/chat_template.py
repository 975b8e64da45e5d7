"""The place of memories in a chat: in the first user turn, before the user's words.

The template is rendered once with a mark at that place; what comes before the mark is the head (a
system prompt, the turn's opening), and its states are the target's own, captured once. Measurements
of other places are in docs/fidelity-log.md.
"""

from __future__ import annotations

from typing import Any

from awareness_vllm.errors import UnsupportedRequest

TEXT_PARTS = ("text", "input_text")
SEPARATOR = "\n\n"
"""Between a memory and the user's words."""


def insert_mark(messages: str | list[Any], mark: str) -> str | list[Any]:
    """The messages of a chat (or the responses API's input) with `mark` before the first words of a
    user; the original messages stay as they are.

    Raises:
        UnsupportedRequest: no message of a user has text.
    """
    if isinstance(messages, str):
        return mark + messages
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            content = _marked_content(message.get("content"), mark)
            if content is not None:
                return [*messages[:i], {**message, "content": content}, *messages[i + 1 :]]
    raise UnsupportedRequest(
        "there is no place for a memory in this chat",
        found=f"{len(messages)} messages",
        expected="a user's message with text",
        remedy="ask something in a message of the role user",
    )


def _marked_content(content: object, mark: str) -> str | list[Any] | None:
    """A message's content with `mark` before its first text; None where it has none."""
    if isinstance(content, str):
        return mark + content
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            marked = {**part, "text": mark + str(part.get("text", ""))}
            return [*content[:i], marked, *content[i + 1 :]]  # type: ignore[index]
    return None


def split_at_mark(rendered: str, mark: str) -> tuple[str, str]:
    """The parts of a rendered template before and after the mark.

    Raises:
        UnsupportedRequest: the template leaves the mark out, or repeats it.
    """
    parts = rendered.split(mark)
    if len(parts) != 2:
        raise UnsupportedRequest(
            "there is no place for a memory in this chat template",
            found=f"the first user's message {len(parts) - 1} times",
            expected="once",
            remedy="use /v1/completions, or another --chat-template",
        )
    return parts[0], SEPARATOR + parts[1]
