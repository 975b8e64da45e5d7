"""What is refused before the engine: extras that it would die of, memories nobody would read."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.api.validation import DEEPEST, IGNORANT, check_carried, refuse_memories

pytestmark = pytest.mark.unit


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_ordinary_extras_pass(value: Any) -> None:
    check_carried("kv_transfer_params", value)


@pytest.mark.parametrize(
    "wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: [{"a": [1], "b": x}]]
)
def test_what_is_nested_too_deep_is_refused(wrap: Any) -> None:
    value: Any = 1
    for _ in range(DEEPEST + 1):
        value = wrap(value)
    with pytest.raises(UnsupportedRequest, match="levels"):
        check_carried("kv_transfer_params", value)


@pytest.mark.parametrize("value", ["\ud800", ["\udfff"], {"\ud800": 1}, {"a": {"b": "x\ud800"}}])
def test_what_is_not_unicode_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedRequest, match="Unicode"):
        check_carried("vllm_xargs", value)


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.post(IGNORANT[0])
    async def ignorant(request: Request) -> Any:
        return await request.json()

    @app.post("/v1/other")
    async def other(request: Request) -> Any:
        return await request.json()

    refuse_memories(app)
    return TestClient(app)


@pytest.mark.parametrize("field", ["memory_ids", "memory"])
def test_memories_are_refused_where_nobody_knows_them(client: TestClient, field: str) -> None:
    refused = client.post(IGNORANT[0], json={"prompt": "hi", field: ["mem_"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    assert client.post("/v1/other", json={field: ["mem_"]}).json() == {field: ["mem_"]}


@pytest.mark.parametrize("body", [{"prompt": "x" * 200_000}, {"memory": None}, [], "memory_ids"])
def test_everything_else_passes_as_it_came(client: TestClient, body: Any) -> None:
    assert client.post(IGNORANT[0], json=body).json() == body
