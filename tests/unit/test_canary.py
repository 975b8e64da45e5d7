"""Checks of claimed memories: once each, before their first use, and of nobody else's."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import PackageCorrupt, UnsupportedModel
from awareness_vllm.packages.origin import Origin
from awareness_vllm.serving.api.canary import Canary
from awareness_vllm.serving.connector.canary import Canary as WorkerCanary
from awareness_vllm.serving.connector.capture_queue import PENDING, CaptureQueue
from awareness_vllm.serving.connector.loader import LoadedSource
from awareness_vllm.serving.connector.worker_extension import CHECK_MEMORY
from awareness_vllm.serving.params import Part
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory

pytestmark = pytest.mark.unit


class StubClient:
    """Stands for MemoryEngineClient: counts what the model reads, answers what the test says."""

    def __init__(self, *complaints: str) -> None:
        self.complaints, self.read_ids = list(complaints), []
        self.error: Exception | None = None
        self.failure, self.discarded = "", []

    async def read(self, ids: list[int]) -> str:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        self.read_ids.append(ids)
        return "capture"

    async def poll(self, method: str, *args: Any) -> list[list[str]]:
        assert (method, args[0]) == (CHECK_MEMORY, "capture")
        Part.model_validate_json(args[1])
        return [[complaint, self.failure] for complaint in self.complaints]

    async def discard(self, capture: str) -> None:
        self.discarded.append(capture)


def prompt_of(origin: Origin = "claimed", digest: str = "d" * 64) -> Prompt:
    memory = ResolvedMemory("mem_x", digest, origin, None, list(range(100)), 1)
    return Prompt((memory,), tail=0)


def check(canary: Canary, *prompts: Prompt) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*map(canary.check, prompts), return_exceptions=True)

    return asyncio.run(all_at_once())


def test_a_claimed_memory_is_read_once_for_all_who_ask() -> None:
    client = StubClient("", "")
    assert check(Canary(client), prompt_of(), prompt_of()) == [None, None]
    # Its prefix and 64 tokens.
    assert client.read_ids == [list(range(65))]


def test_what_needs_no_check_is_not_read() -> None:
    client = StubClient("states of another text")
    prompts = prompt_of("own"), prompt_of("signed"), prompt_of().recomputed()
    assert check(Canary(client), *prompts) == [None] * 3
    assert client.read_ids == []


def test_a_complaint_refuses_the_memory_and_no_other() -> None:
    client = StubClient("", "states of another text")
    canary = Canary(client)

    async def twice() -> None:
        for _ in range(2):
            with pytest.raises(PackageCorrupt, match="states of another text"):
                await canary.check(prompt_of())
        client.complaints = ["", ""]
        await canary.check(prompt_of(digest="e" * 64))

    asyncio.run(twice())
    assert len(client.read_ids) == 2


def test_a_check_that_came_to_nothing_is_made_again() -> None:
    client = StubClient("")
    canary = Canary(client)

    async def twice() -> None:
        client.error = RuntimeError("the engine was busy")
        with pytest.raises(RuntimeError):
            await canary.check(prompt_of())
        client.error = None
        await canary.check(prompt_of())

    asyncio.run(twice())
    assert len(client.read_ids) == 1


def test_a_file_that_cannot_be_read_refuses_nobody_elses_memory_and_not_for_good() -> None:
    client = StubClient("")
    canary = Canary(client)

    async def one_tenant_after_another() -> None:
        client.failure = "its file was replaced"
        with pytest.raises(PackageCorrupt, match="its file was replaced"):
            await canary.check(replace(prompt_of(), tenant="attacker"))
        client.failure = ""
        await canary.check(replace(prompt_of(), tenant="victim"))
        await canary.check(replace(prompt_of(), tenant="attacker"))

    asyncio.run(one_tenant_after_another())
    assert len(client.discarded) == len(client.read_ids) == 3


class StubLoader:
    """Stands for MemoryLoader: a copy, which a thread reads."""

    def __init__(self, memory: AlignedMemory) -> None:
        self.readers, self.memory = ThreadPoolExecutor(1), memory
        self.reads = SimpleNamespace(release=lambda source: None)
        self.wmatrices: dict[str, Any] = {}
        self.error: Exception | None = None

    def read(self, part: Part, tenant: str) -> Future[LoadedSource]:
        return self.readers.submit(self.read_source)

    def read_source(self) -> LoadedSource:
        if self.error:
            raise self.error
        return LoadedSource("cold", self.memory)


def states(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(30, 1, 8, generator=generator) for _ in range(2)]


def captured(keys: list[torch.Tensor]) -> CaptureQueue:
    queue = CaptureQueue()
    queue.announce("capture", "")
    tensors = {f"layers.{i}.{part}": key[:20] for i, key in enumerate(keys) for part in PARTS}
    queue.capture("capture", lambda: tensors)
    return queue


PARTS = ("key", "value")
PART = Part(memory="mem_x", digest="d", tokens=30)


@pytest.mark.parametrize(("seed", "complains"), [(0, False), (1, True)])
def test_a_worker_compares_the_first_keys(seed: int, complains: bool) -> None:
    memory = AlignedMemory(list(range(30)), states(0), states(5))
    canary = WorkerCanary(StubLoader(memory), captured(states(seed)))
    while (answer := canary.check_memory("capture", PART, "")) == PENDING:
        pass
    complaint, error = answer
    assert (bool(complaint), error) == (complains, "")
    assert canary.sources == {}


def test_a_worker_reports_every_failure_as_a_message() -> None:
    memory = AlignedMemory(list(range(30)), states(0), states(5))
    loader = StubLoader(memory)
    loader.error = PackageCorrupt("no such bytes")
    canary = WorkerCanary(loader, captured(states(0)))
    while (answer := canary.check_memory("capture", PART, "")) == PENDING:
        pass
    assert answer[0] == ""
    assert "no such bytes" in answer[1]
    # Nothing was captured under that name.
    canary = WorkerCanary(StubLoader(replace(memory)), CaptureQueue())
    while (answer := canary.check_memory("capture", PART, "")) == PENDING:
        pass
    assert answer[1]


def test_a_cache_that_cannot_be_read_back_is_no_complaint(wmatrix: Any) -> None:
    def read() -> Any:
        raise UnsupportedModel("a quantised KV cache")

    def queue() -> CaptureQueue:
        captures = CaptureQueue()
        captures.announce("capture", "")
        captures.capture("capture", read)
        return captures

    loader = StubLoader(AlignedMemory(list(range(30)), states(0), states(5)))
    loader.wmatrices["map"] = wmatrix
    canary = WorkerCanary(loader, queue())
    while (answer := canary.check_memory("capture", PART, "")) == PENDING:
        pass
    assert answer == ["", ""]
    assert WorkerCanary(loader, queue()).check_sink("capture", "map") == ""


@pytest.mark.parametrize(("seed", "complains"), [(0, False), (1, True)])
def test_a_sink_is_the_models_own(wmatrix: Any, seed: int, complains: bool) -> None:
    loader = StubLoader(AlignedMemory([], [], []))
    loader.wmatrices["map"] = replace(wmatrix, sink_keys=states(0), sink_values=states(0))
    queue = CaptureQueue()
    queue.announce("capture", "")
    own = {f"layers.{i}.{part}": key for i, key in enumerate(states(seed)) for part in PARTS}
    queue.capture("capture", lambda: own)
    assert bool(WorkerCanary(loader, queue).check_sink("capture", "map")) is complains
