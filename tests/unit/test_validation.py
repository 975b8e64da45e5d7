"""Refused before the engine: extras that it would die of, memories on routes that ignore them."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.api.validation import (
    MAX_DEPTH,
    OTHER_ROUTES,
    check_engine_extras,
    refuse_memories,
)

pytestmark = pytest.mark.unit


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_ordinary_extras_pass(value: Any) -> None:
    check_engine_extras("kv_transfer_params", value)


@pytest.mark.parametrize(
    "wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: [{"a": [1], "b": x}]]
)
def test_extras_that_nest_too_deep_are_refused(wrap: Any) -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH + 1):
        value = wrap(value)
    with pytest.raises(UnsupportedRequest, match="levels"):
        check_engine_extras("kv_transfer_params", value)


@pytest.mark.parametrize("value", ["\ud800", ["\udfff"], {"\ud800": 1}, {"a": {"b": "x\ud800"}}])
def test_extras_that_are_not_unicode_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedRequest, match="Unicode"):
        check_engine_extras("vllm_xargs", value)


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.post(OTHER_ROUTES[0])
    async def without_memories(request: Request) -> Any:
        return await request.json()

    @app.post("/v1/other")
    async def other(request: Request) -> Any:
        return await request.json()

    refuse_memories(app)
    return TestClient(app)


@pytest.mark.parametrize("field", ["memory_ids", "memory"])
def test_memories_are_refused_where_they_would_be_ignored(client: TestClient, field: str) -> None:
    refused = client.post(OTHER_ROUTES[0], json={"prompt": "hi", field: ["mem_"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    assert client.post("/v1/other", json={field: ["mem_"]}).json() == {field: ["mem_"]}


@pytest.mark.parametrize("body", [{"prompt": "x" * 200_000}, {"memory": None}, [], "memory_ids"])
def test_everything_else_passes_as_it_came(client: TestClient, body: Any) -> None:
    assert client.post(OTHER_ROUTES[0], json=body).json() == body
