"""The front end's calls to the engine's workers: prefetch and eviction of memories."""

from __future__ import annotations

import pytest
from memories_server import DELETE, LOAD, Make, Server

from awareness_vllm.serving.connector.worker_extension import EVICT, PREFETCH
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("answers", "temperature"),
    [(["cold", "cold"], "cold"), (["warm", "cold"], "cold"), (["warm", "warm"], "warm")],
)
def test_a_memory_is_warm_only_where_all_workers_had_it(
    server: Server,
    make_package: Make,
    wmatrix: WMatrix,
    answers: list[str],
    temperature: str,
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix)
    server.engine.answers[PREFETCH] = answers
    response = server.call(LOAD, memory)
    assert response.status_code == 200
    assert response.json() == {"id": memory, "object": "memory.load", "temperature": temperature}
    ((method, (_, params_json, pin)),) = server.engine.calls
    params = LoadParams.model_validate_json(params_json)
    assert (method, pin) == (PREFETCH, False)
    assert [(part.memory, part.wmatrix) for part in params.parts] == [(memory, "d" * 64)]
    assert params.tenant == "acme"


def test_a_worker_that_cannot_load_says_why(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix)
    server.engine.answers[PREFETCH] = ["warm", "its file is gone"]
    response = server.call(LOAD, memory)
    assert response.status_code == 422
    assert "its file is gone" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("answers", "evicted"), [([False, False], False), ([True, True], True), ([False, True], True)]
)
def test_eviction_leaves_the_package(
    server: Server, make_package: Make, answers: list[bool], evicted: bool
) -> None:
    memory = server.publish(make_package())
    server.engine.answers[EVICT] = answers
    response = server.call(DELETE, memory)
    assert response.status_code == 200
    assert response.json() == {"id": memory, "object": "memory.evicted", "evicted": evicted}
    assert server.engine.calls == [(EVICT, (memory, "acme"))]
    assert server.get()["data"][0]["id"] == memory
