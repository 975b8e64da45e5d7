"""Admission: what is let through at once, in the front end, before the engine sees a request."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from memories_server import CHECK, DELETE, GET, LOAD, Make, Server
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from awareness_vllm.errors import (
    AwarenessError,
    MemoryNotFound,
    PackageTooLarge,
    StorageFull,
    TooManyLoads,
)
from awareness_vllm.packages.store import Store
from awareness_vllm.serving import admission as module
from awareness_vllm.serving.admission import Admission, Admitted
from awareness_vllm.serving.api.prefetch import Prefetches, while_connected
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.prefetcher import TOO_MANY
from awareness_vllm.serving.connector.worker_extension import CANCEL, LOADED, POLL, PREFETCH
from awareness_vllm.serving.http import BusyError, client_error
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

PLAN = LoadParams(parts=(Part(memory="m", digest="m", tokens=3),))


def memory(number: int) -> str:
    return f"mem_{number:032x}"


class Workers:
    """Says which memories are loaded, when it is asked."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.asked = 0

    async def __call__(self, memories: Any) -> set[str]:
        self.asked += 1
        return self.loaded & set(memories)


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def admission(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Admission:
    """Of two loads and 100 bytes; the memories 0 … 7 have 40 bytes each, memory 8 has 101."""
    monkeypatch.setattr(module, "ASK_AGAIN_S", -1.0)
    for number in range(9):
        (tmp_path / f"{memory(number)}.safetensors").write_bytes(bytes(101 if number > 7 else 40))
    return Admission({"": Store(tmp_path)}, workers, max_loads=2, max_bytes=100)


def admit(admission: Admission, *numbers: int) -> Admitted:
    return asyncio.run(admission.admit("", [memory(number) for number in numbers]))


def test_cold_memories_are_let_through_up_to_the_bounds(
    admission: Admission, workers: Workers
) -> None:
    first = admit(admission, 0)
    admit(admission, 1)
    assert workers.asked == 0
    with pytest.raises(TooManyLoads) as refused:
        admit(admission, 2)
    assert "2 memories" in str(refused.value)
    admit(admission, 0, 1)  # on their way already
    first.end()
    with pytest.raises(TooManyLoads):
        admit(admission, 2)  # memory 0 has another request
    admission.max_loads = 3
    with pytest.raises(TooManyLoads):
        admit(admission, 2)  # 120 bytes
    admission.max_bytes = 120
    admit(admission, 2)


def test_one_request_alone_may_name_as_many_as_fit_one_by_one(admission: Admission) -> None:
    all_at_once = admit(admission, *range(8))
    assert len(admission.loads) == 8
    all_at_once.end()
    all_at_once.end()
    assert admission.loads == {}


def test_warm_memories_cost_nothing(admission: Admission, workers: Workers) -> None:
    with admit(admission, 0, 1):
        workers.loaded = {memory(0)}
        admit(admission, 2).end()  # the workers say that there is room
        assert workers.asked == 1
    with pytest.raises(ValueError, match="failed"), admit(admission, 3):
        raise ValueError("failed")
    admission.max_loads = 1
    held = admit(admission, 3)
    admit(admission, 0, 1)
    admission.forget(memory(1))
    workers.loaded = set()
    with pytest.raises(TooManyLoads):
        admit(admission, 1)
    held.end(warm=True)
    assert admit(admission, 3).loads == []


def test_a_file_larger_than_all_that_may_be_loaded_is_refused(admission: Admission) -> None:
    with pytest.raises(PackageTooLarge, match="--max-load-gib"):
        admit(admission, 8)
    with pytest.raises(PackageTooLarge, match="--max-load-gib"):
        asyncio.run(admission.admit_capture("key", 101))
    with pytest.raises(MemoryNotFound):
        admit(admission, 9)
    assert admission.loads == {}


def test_captures_count_as_loads_do(admission: Admission) -> None:
    capture = asyncio.run(admission.admit_capture("key", 90))
    with pytest.raises(TooManyLoads):
        admit(admission, 0)
    capture.end()
    admit(admission, 0)


def test_a_flood_of_refused_requests_asks_the_workers_seldom(
    admission: Admission, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_AGAIN_S", 60.0)
    admit(admission, 0, 1)
    for _ in range(10):
        with pytest.raises(TooManyLoads):
            admit(admission, 2)
    assert workers.asked == 1


# Until the response


async def chunks(count: int = 2) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x"


async def answered(admitted: Admitted, answer: Callable[[], Any]) -> Any:
    async def work() -> Any:
        return answer()

    return await admitted.until_answered(work())


@pytest.mark.parametrize(
    ("response", "warm"),
    [
        (JSONResponse({}), True),
        (JSONResponse({}, status_code=400), False),
        # A client that has gone, to vLLM 0.32 and to 0.33.
        (None, False),
        (Response(), False),
    ],
)
def test_a_load_ends_with_its_response(
    admission: Admission, response: Response | None, warm: bool
) -> None:
    asyncio.run(answered(admit(admission, 0), lambda: response))
    assert admission.loads == {}
    assert (memory(0) in admission.warm) is warm


def test_a_load_ends_with_its_error(admission: Admission) -> None:
    def fails() -> None:
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        asyncio.run(answered(admit(admission, 0), fails))
    assert (dict(admission.loads), dict(admission.warm)) == ({}, {})


@pytest.mark.slow
def test_a_streams_load_ends_with_its_last_chunk_or_its_client(admission: Admission) -> None:
    async def streams() -> None:
        admitted = await admission.admit("", [memory(0)])
        response = await answered(admitted, lambda: StreamingResponse(chunks()))
        body = [chunk async for chunk in response.body_iterator]
        assert body == [b"x"] * 2
        assert admission.loads == {}
        for read in (0, 1):
            admission.forget(memory(0))
            admitted = await admission.admit("", [memory(0)])
            response = await answered(admitted, lambda: StreamingResponse(chunks()))
            for _ in range(read):
                await anext(response.body_iterator)
            assert list(admission.loads) == [memory(0)]
            if read:
                await response.body_iterator.aclose()
            del response, admitted
            gc.collect()
            assert admission.loads == {}

    asyncio.run(streams())


# Over HTTP


def test_a_server_at_its_bounds_says_when_to_try_again(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    server.add_map(wmatrix)
    first, second = (server.publish(make_package(seed=seed)) for seed in range(2))
    server.admission.max_loads = 1
    held = asyncio.run(server.admission.admit("acme", [first]))
    response = server.call(LOAD, second)
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) > 0
    assert response.json()["error"]["code"] == 429
    assert [name for name, _ in server.engine.calls] == [LOADED]
    held.end()
    assert server.call(LOAD, second).status_code == 200
    server.admission.max_loads = 1
    assert server.call(LOAD, second).status_code == 200
    server.call(DELETE, second)
    assert second not in server.admission.warm


@pytest.mark.parametrize("route", [GET, CHECK, LOAD])
def test_a_large_file_is_refused_before_it_is_read(
    server: Server, make_package: Make, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    memory = server.publish(make_package())
    monkeypatch.setattr(server.resolver, "check", lambda *args: pytest.fail("it was read"))
    server.admission.max_bytes = 100
    response = server.call(route, memory)
    assert response.status_code == 422
    assert "--max-load-gib" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"), [(TooManyLoads("busy"), 429), (StorageFull("full"), 507)]
)
def test_errors_keep_their_status_on_vllms_routes(error: AwarenessError, status: int) -> None:
    raised: Any = client_error(error)
    assert raised.http_status == status
    assert isinstance(raised, BusyError) is (status == 429)


# Prefetches of the front end


class Calls:
    """Two workers that answer by a script, and the calls that they were sent."""

    def __init__(self, *polls: Any, begin: Any = (PENDING, PENDING)) -> None:
        self.polls, self.begin = list(polls), list(begin)
        self.sent: list[tuple[str, Any]] = []

    async def __call__(self, name: str, *args: Any) -> list[Any]:
        self.sent.append((name, args[0]))
        await asyncio.sleep(0)
        if name == POLL:
            answers = self.polls.pop(0)
            if isinstance(answers, Exception):
                raise answers
            return [(False, [one] * len(args[0])) for one in answers]
        return self.begin if name == PREFETCH else [None, None]

    def count(self, name: str) -> int:
        return [one for one, _ in self.sent].count(name)


def test_each_workers_first_answer_counts() -> None:
    calls = Calls((PENDING, PENDING), ("cold", PENDING), ("gone", "warm"))
    assert asyncio.run(Prefetches(calls).run(PLAN)) == "cold"
    assert (calls.count(POLL), calls.count(CANCEL)) == (3, 0)


def test_all_prefetches_share_their_polls() -> None:
    calls = Calls((PENDING, PENDING), ("warm", "warm"))

    async def both() -> list[str]:
        prefetches = Prefetches(calls)
        return await asyncio.gather(prefetches.run(PLAN), prefetches.run(PLAN))

    assert asyncio.run(both()) == ["warm", "warm"]
    assert calls.count(POLL) == 2


def test_a_prefetch_that_nobody_waits_for_is_given_up() -> None:
    calls = Calls(*[(PENDING, PENDING)] * 1000)

    async def gone() -> None:
        messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            await asyncio.sleep(0.01)
            return next(messages)

        prefetches = Prefetches(calls)
        request = Request({"type": "http"}, receive)
        assert await while_connected(request, prefetches.run(PLAN)) is None
        async with asyncio.timeout(30):
            while not calls.count(CANCEL):
                await asyncio.sleep(0.001)
        assert prefetches.waiting == {}

    asyncio.run(gone())
    (ticket,) = (one for name, one in calls.sent if name == PREFETCH)
    assert (CANCEL, [ticket]) in calls.sent


def test_an_engine_that_dies_ends_all_prefetches() -> None:
    calls = Calls(RuntimeError("dead"))
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(Prefetches(calls).run(PLAN))
    with pytest.raises(TooManyLoads):
        asyncio.run(Prefetches(Calls(begin=(TOO_MANY, "warm"))).run(PLAN))
