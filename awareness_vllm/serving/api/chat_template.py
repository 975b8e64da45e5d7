"""Where in a chat a memory stands: in the first user turn, before what the user says.

The template is rendered once with a mark at that place; what comes before the mark is the head (a
system prompt, the turn's opening), and its states are the target's own, captured once. What the
place is worth is in docs/fidelity-log.md.
"""

from __future__ import annotations

from typing import Any

from awareness_vllm.errors import UnsupportedRequest

TEXT_PARTS = ("text", "input_text")
SEPARATOR = "\n\n"
"""Between a memory and what the user says."""


def mark(messages: str | list[Any], text: str) -> str | list[Any]:
    """The messages of a chat (or the responses API's input) with `text` before the first thing
    that a user says; the messages that were given stay as they are.

    Raises:
        UnsupportedRequest: no user says anything.
    """
    if isinstance(messages, str):
        return text + messages
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            content = _marked_content(message.get("content"), text)
            if content is not None:
                return [*messages[:i], {**message, "content": content}, *messages[i + 1 :]]
    raise UnsupportedRequest(
        "there is no place for a memory in this chat",
        found=f"{len(messages)} messages",
        expected="a user's message with text",
        remedy="ask something in a message of the role user",
    )


def _marked_content(content: object, text: str) -> str | list[Any] | None:
    """A message's content with `text` before its own first text; None where it has none."""
    if isinstance(content, str):
        return text + content
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            marked = {**part, "text": text + str(part.get("text", ""))}
            return [*content[:i], marked, *content[i + 1 :]]  # type: ignore[index]
    return None


def split(rendered: str, text: str) -> tuple[str, str]:
    """What a rendered template has before and after the mark.

    Raises:
        UnsupportedRequest: the template leaves the mark out, or repeats it.
    """
    parts = rendered.split(text)
    if len(parts) != 2:
        raise UnsupportedRequest(
            "there is no place for a memory in this chat template",
            found=f"the first user's message {len(parts) - 1} times",
            expected="once",
            remedy="use /v1/completions, or another --chat-template",
        )
    return parts[0], SEPARATOR + parts[1]
