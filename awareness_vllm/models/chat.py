"""A question as a model's chat template words it, and the place of memories within."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import UnsupportedModel, UnsupportedRequest
from awareness_vllm.models.folder import chat_templates

SEPARATOR = "\n\n"
"""Between a memory and the user's words."""


@dataclass(frozen=True)
class ChatPrompt:
    """A model's ids before and after the place of memories."""

    head: list[int]
    rest: list[int]


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
            remedy="ask for a plain completion, or use another chat template",
        )
    return parts[0], SEPARATOR + parts[1]


def chat_prompt(folder: Path, question: str) -> ChatPrompt | None:
    """A user's question in the chat template of a model folder, rendered by transformers, the
    memory before the question; None for a model without one, which completes text.

    Raises:
        UnsupportedModel: a template that cannot be rendered.
        UnsupportedRequest: one without a place for memories.
    """
    if not chat_templates(folder):
        return None
    from transformers import AutoTokenizer

    mark = secrets.token_hex(16)
    messages = [{"role": "user", "content": mark + question}]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # of any type: templates are programs
        raise UnsupportedModel(
            f"the chat template of {folder.name} cannot be rendered",
            found=f"{type(error).__name__}: {error}"[:300],
            expected="one that renders a user's message",
            remedy="ask for a plain completion (--raw), or repair the template",
        ) from error
    head, rest = split_at_mark(str(rendered), mark)
    return ChatPrompt(*(tokenizer.encode(part, add_special_tokens=False) for part in (head, rest)))
