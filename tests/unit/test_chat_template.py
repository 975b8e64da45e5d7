"""The place of memories in a chat: before the first words of a user."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.models.chat import SEPARATOR, split_at_mark
from awareness_vllm.serving.api.chat_template import insert_mark

pytestmark = pytest.mark.unit

MARK = "0123456789abcdef"
USER = {"role": "user", "content": "question"}


@pytest.mark.parametrize(
    ("messages", "marked"),
    [
        ("question", MARK + "question"),
        ([USER], [{"role": "user", "content": MARK + "question"}]),
        (
            [{"role": "system", "content": "be short"}, USER, {"role": "assistant"}, {**USER}],
            [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": MARK + "question"},
                {"role": "assistant"},
                USER,
            ],
        ),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}],
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": MARK + "q"}],
                }
            ],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
            [{"role": "user", "content": [{"type": "input_text", "text": MARK + "q"}]}],
        ),
        (
            [{"role": "user", "content": []}, USER],
            [{"role": "user", "content": []}, {"role": "user", "content": MARK + "question"}],
        ),
    ],
)
def test_a_memory_stands_before_the_first_words_of_a_user(messages: Any, marked: Any) -> None:
    before = copy.deepcopy(messages)
    assert insert_mark(messages, MARK) == marked
    assert messages == before


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "hi"}], [7], [{}]])
def test_a_chat_in_which_no_user_speaks_has_no_place(messages: list[Any]) -> None:
    with pytest.raises(UnsupportedRequest, match="no place"):
        insert_mark(messages, MARK)


def test_a_template_is_cut_at_the_mark() -> None:
    assert split_at_mark(f"<bos>head{MARK}rest", MARK) == ("<bos>head", f"{SEPARATOR}rest")
    for rendered in ("no mark", f"{MARK} and {MARK}"):
        with pytest.raises(UnsupportedRequest, match="no place"):
            split_at_mark(rendered, MARK)
