"""The place of memories in a chat: in the first user turn, before the user's words.

The template is rendered once with a mark at that place; what comes before the mark is the head (a
system prompt, the turn's opening), and its states are the target's own, captured once. Measurements
of other places are in docs/fidelity-log.md.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.chat_utils import has_non_text_content

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.models.chat import split_at_mark
from awareness_vllm.passages.quotes import NO_QUOTES
from awareness_vllm.serving.http import FrontEnd
from awareness_vllm.serving.prompt import Prompt

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

Render = Callable[[str], Awaitable[Any]]
"""Renders a chat with a mark where memories belong, into vLLM's ErrorResponse, or the messages and
the engine input."""

TEXT_PARTS = ("text", "input_text")


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


async def rendered_chat(
    handler: OpenAIServingChat | None, request: ChatCompletionRequest, mark: str
) -> Any:
    """A request's messages and engine input from vLLM's chat handler, with a mark where memories
    belong."""
    assert handler is not None  # this plugin loads only where the task is "generate"
    marked = render_copy(request, messages=insert_mark(request.messages, mark))
    rendered = await handler.render_chat_request(marked)
    return rendered if isinstance(rendered, ErrorResponse) else (marked.messages, rendered[1][0])


def render_copy(request: Any, **update: Any) -> Any:
    """A copy to render: rendering must not use up what the request itself carries."""
    return request.model_copy(update={**update, "kv_transfer_params": None})


@dataclass(frozen=True)
class PlacedChat:
    """Memories after a chat's head, the ids of the whole prompt, and the last user's words."""

    prompt: Prompt
    ids: list[int]
    question: str


def last_words(messages: Sequence[Any]) -> str:
    """The text of the last user's message."""
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list) else []
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            return " ".join(text for text in texts if isinstance(text, str))
    return ""


def user_turns(messages: Sequence[Any]) -> int:
    """How many messages are the user's."""
    return sum(isinstance(one, dict) and one.get("role") == "user" for one in messages)


async def placed_in_chat(
    front: FrontEnd, prompt: Prompt, render: Render, answer: int = 1, *, use: bool = True
) -> PlacedChat | None:
    """Memories in their place in a chat; None where vLLM refuses it.

    Args:
        answer: tokens that it may have.
        use: whether that is a use of the memories, or its tokens are just counted.

    Raises:
        UnsupportedRequest: a chat without a place for memories, or with more than text;
        ContextTooLong: it does not fit.
    """
    mark = secrets.token_hex(16)
    rendered = await render(mark)
    if isinstance(rendered, ErrorResponse):
        return None
    messages, engine_input = rendered
    if has_non_text_content(messages):  # vLLM would render them again, without the memories
        raise not_a_chat("a message with more than text")
    head, rest = split_at_mark(engine_input.get("prompt") or "", mark)
    prompt = prompt.with_head(front.engine_client.tokenize(head))
    ids, question = front.engine_client.tokenize(rest), last_words(messages).replace(mark, "")
    front.resolver.append_question(prompt, ids)  # what is refused is no use of a memory
    prompt = await front.editions.use(prompt, count=use)
    if prompt.quoting.automatic and user_turns(messages) > 1:
        # Quotes stand before the first turn, far from what is asked, and would differ each time.
        prompt = replace(prompt, quoting=NO_QUOTES)
    prompt = await asyncio.to_thread(front.resolver.quoted, prompt, [question], len(ids), answer)
    return PlacedChat(prompt, front.resolver.append_question(prompt, ids), question)


def not_a_chat(found: str) -> UnsupportedRequest:
    return UnsupportedRequest(
        "memories cannot be put into this chat",
        found=found,
        expected="a chat of text alone",
        remedy="use /v1/chat/completions or /v1/completions, with text alone",
    )
