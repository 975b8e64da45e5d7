"""The memories of a request: both forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.request import MAX_MEMORIES, MemoryRequest, parse_memory_request

pytestmark = pytest.mark.unit

ID, OTHER = "mem_" + "0" * 32, "mem_" + "1" * 32


def test_a_body_without_memories() -> None:
    for body in ({}, {"prompt": "hi"}, {"memory_ids": None}, {"memory": None, "memory_ids": None}):
        assert parse_memory_request(body) is None


def test_both_forms_mean_the_same() -> None:
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
        {"memory_ids": [ID] * (MAX_MEMORIES + 1)},
        {"memory_ids": [ID], "memory": {"ids": [ID]}},
        {"memory": {}},
        {"memory": [ID]},
        {"memory": {"ids": [ID], "capture": "both"}},
        {"memory": {"capture": ""}},
        {"memory": {"capture": "x" * 201}},
        {"memory": {"capture": "red\x1b[31m"}},
        {"memory": {"capture": "one\nmem_forged"}},
        {"memory": {"ids": [ID], "token_nll": 1}},
        {"memory": {"ids": [ID], "quality_target": 0}},
        {"memory": {"ids": [ID], "quality_target": 1.01}},
        {"memory": {"ids": [ID], "quality_target": "high"}},
        {"memory": {"ids": [ID], "on_low_quality": "shrug"}},
    ],
)
def test_an_unusable_body_is_refused_with_a_remedy(body: dict[str, Any]) -> None:
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
        request = parse_memory_request(body)
    except UnsupportedRequest:
        return
    if request is not None:
        assert bool(request.ids) != (request.capture is not None)
        assert len(set(request.ids)) == len(request.ids) <= MAX_MEMORIES
