"""The front end's calls to the engine's workers: memories to load or evict, heads to keep."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from memories_server import DELETE, LOAD, Make, Server

from awareness_vllm.serving.api import engine_client
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.connector.worker_extension import (
    EVICT,
    FORGET,
    KEEP_HEAD,
    PREFETCH,
    AwarenessWorkerExtension,
)
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


# Heads of chats


class Chats:
    """Stands for vLLM's EngineClient: a head's request ends when `gates` lets it, in `outcome`'s
    way, and the workers answer `kept`."""

    def __init__(self) -> None:
        self.gates: dict[int, asyncio.Event] = {}
        self.prompts: list[Any] = []
        self.calls: list[str] = []
        self.outcome: Exception | None = None
        self.kept = ["", ""]

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        inspect.signature(getattr(AwarenessWorkerExtension, method)).bind(None, *args)
        name, *_ = args
        self.calls.append(name)
        return self.kept if name == KEEP_HEAD else [None, None]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        self.prompts.append(prompt)
        if (gate := self.gates.get(len(prompt["prompt_token_ids"]))) is not None:
            await gate.wait()
        if self.outcome is not None:
            raise self.outcome
        yield None


def heads() -> tuple[Any, MemoryEngineClient]:
    chats: Any = Chats()
    return chats, MemoryEngineClient(chats)


SHORT, LONG = (1, 2), tuple(range(2800))


def test_a_head_is_computed_once_under_a_salt_of_its_own() -> None:
    async def ask() -> None:
        chats, client = heads()
        assert await asyncio.gather(*(client.ensure_head(SHORT) for _ in range(3))) == [""] * 3
        assert await client.ensure_head(SHORT) == ""
        assert await client.ensure_head((3,)) == ""
        salts = [prompt["cache_salt"] for prompt in chats.prompts]
        assert len(salts) == len(set(salts)) == 2

    asyncio.run(ask())


def test_no_chat_waits_for_another_ones_head() -> None:
    async def ask() -> None:
        chats, client = heads()
        await client.ensure_head(SHORT)
        chats.gates[len(LONG)] = gate = asyncio.Event()
        slow = asyncio.create_task(client.ensure_head(LONG))
        await asyncio.sleep(0)
        async with asyncio.timeout(1):
            assert await client.ensure_head(SHORT) == ""
            assert await client.ensure_head((3,)) == ""  # nor is a new one held up
        assert not slow.done()
        gate.set()
        assert await slow == ""

    asyncio.run(ask())


def test_a_chat_that_is_given_up_does_not_take_the_head_with_it() -> None:
    async def ask() -> None:
        chats, client = heads()
        chats.gates[len(LONG)] = gate = asyncio.Event()
        first, second = (asyncio.create_task(client.ensure_head(LONG)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert await second == ""
        assert len(chats.prompts) == 1

    asyncio.run(ask())


def test_a_head_whose_request_fails_is_tried_again() -> None:
    async def ask() -> None:
        chats, client = heads()
        chats.outcome = RuntimeError("the engine is asleep")
        for answer in await asyncio.gather(
            *(client.ensure_head(SHORT) for _ in range(2)), return_exceptions=True
        ):
            assert isinstance(answer, RuntimeError)
        assert FORGET in chats.calls
        chats.outcome = None
        assert await client.ensure_head(SHORT) == ""

    asyncio.run(ask())


def test_a_head_that_cannot_be_kept_says_why_and_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "HEAD_RETRY_S", 0.01)

    async def ask() -> None:
        chats, client = heads()
        chats.kept = ["", "a quantised cache"]
        assert [await client.ensure_head(SHORT) for _ in range(2)] == ["a quantised cache"] * 2
        assert len(chats.prompts) == 1
        await asyncio.sleep(0.05)
        chats.kept = ["", ""]
        assert await client.ensure_head(SHORT) == ""

    asyncio.run(ask())


def test_no_more_heads_are_known_than_workers_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "MAX_HEADS", 2)

    async def ask() -> None:
        chats, client = heads()
        for ids in ((1,), (2,), (1,), (3,), (1,)):
            await client.ensure_head(ids)
        assert [prompt["prompt_token_ids"] for prompt in chats.prompts] == [[1], [2], [3]]
        assert len(client.heads) == 2

    asyncio.run(ask())


def test_a_head_is_computed_again_once_it_is_forgotten() -> None:
    async def ask() -> None:
        chats, client = heads()
        for ids in (SHORT, (3,), SHORT):
            await client.ensure_head(ids)
        client.forget_head(SHORT)
        client.forget_head(())
        client.forget_head((7,))
        for ids in (SHORT, (3,)):
            await client.ensure_head(ids)
        assert [prompt["prompt_token_ids"] for prompt in chats.prompts] == [[1, 2], [3], [1, 2]]

    asyncio.run(ask())
