"""What a request may ask of memories, and where a chat puts them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.api.chat_template import SEPARATOR, mark, split
from awareness_vllm.serving.request import MOST, MemoryRequest, parse_memory_request

pytestmark = pytest.mark.unit

ID, OTHER = "mem_" + "0" * 32, "mem_" + "1" * 32
MARK = "0123456789abcdef"


def test_nothing_is_asked_where_no_field_says_so() -> None:
    for body in ({}, {"prompt": "hi"}, {"memory_ids": None}, {"memory": None, "memory_ids": None}):
        assert parse_memory_request(body) is None


def test_both_forms_say_the_same() -> None:
    assert parse_memory_request({"memory_ids": [ID, OTHER]}) == parse_memory_request(
        {"memory": {"ids": [ID, OTHER]}}
    )
    long = {"ids": [ID], "quality_target": 0.9, "on_low_quality": "fail"}
    assert parse_memory_request({"memory": long}) == MemoryRequest(
        ids=(ID,), quality_target=0.9, on_low_quality="fail"
    )
    assert parse_memory_request({"memory": {"capture": "name"}}) == MemoryRequest(capture="name")


@pytest.mark.parametrize(
    "body",
    [
        {"memory_ids": []},
        {"memory_ids": ID},
        {"memory_ids": {}},
        {"memory_ids": [7]},
        {"memory_ids": [ID, ID]},
        {"memory_ids": [ID] * (MOST + 1)},
        {"memory_ids": [ID], "memory": {"ids": [ID]}},
        {"memory": {}},
        {"memory": [ID]},
        {"memory": {"ids": [ID], "capture": "both"}},
        {"memory": {"capture": ""}},
        {"memory": {"ids": [ID], "token_nll": 1}},
        {"memory": {"ids": [ID], "quality_target": 0}},
        {"memory": {"ids": [ID], "quality_target": 1.01}},
        {"memory": {"ids": [ID], "quality_target": "high"}},
        {"memory": {"ids": [ID], "on_low_quality": "shrug"}},
    ],
)
def test_what_cannot_be_used_is_refused_with_the_remedy(body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedRequest, match="Remedy: send"):
        parse_memory_request(body)


@given(
    st.dictionaries(
        st.sampled_from(["memory", "memory_ids", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["ids", "capture", "quality_target"]), inner)
            ),
            max_leaves=8,
        ),
    )
)
def test_any_body_is_understood_or_refused(body: dict[str, Any]) -> None:
    try:
        asked = parse_memory_request(body)
    except UnsupportedRequest:
        return
    if asked is not None:
        assert bool(asked.ids) != (asked.capture is not None)
        assert len(set(asked.ids)) == len(asked.ids) <= MOST


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
def test_a_memory_stands_before_the_first_thing_that_a_user_says(
    messages: Any, marked: Any
) -> None:
    before = copy.deepcopy(messages)
    assert mark(messages, MARK) == marked
    assert messages == before


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "hi"}], [7], [{}]])
def test_a_chat_in_which_no_user_speaks_has_no_place(messages: list[Any]) -> None:
    with pytest.raises(UnsupportedRequest, match="no place"):
        mark(messages, MARK)


def test_a_template_is_cut_at_the_mark() -> None:
    assert split(f"<bos>head{MARK}rest", MARK) == ("<bos>head", f"{SEPARATOR}rest")
    for rendered in ("no mark", f"{MARK} and {MARK}"):
        with pytest.raises(UnsupportedRequest, match="no place"):
            split(rendered, MARK)
