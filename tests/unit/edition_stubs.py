"""A front end's editions and a worker's, with the captures and tiers between them; of vLLM there is
what they call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.connector.capture_queue import CaptureQueue
from awareness_vllm.serving.connector.editions import EditionDrafts
from awareness_vllm.serving.connector.kv_layout import KVLayout
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import WorkerCalls
from awareness_vllm.serving.params import EDITION, Key, LoadParams
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.trust.policy import Signers
from awareness_vllm.wmatrix.registry import WMatrixEntry

DIGEST = "a" * 64
MEMORY = "mem_" + "a" * 32
IDS = [2, *range(100, 129)]
"""A sink and 29 tokens."""
WINDOW, BLOCK = 9, 4
MAP = cast(WMatrixEntry, SimpleNamespace(digest="m", certificate=None, claimed=False))
MAP.signers = lambda signed_by: Signers()  # type: ignore[method-assign]


def memory(digest: str = DIGEST, **fields: Any) -> ResolvedMemory:
    given = {"origin": "claimed", "wmatrix": None, "ids": IDS, "prefix": 1}
    return ResolvedMemory(f"mem_{digest[:32]}", digest, **{**given, **fields})


def states_at(ids: list[int], begin: int) -> dict[str, torch.Tensor]:
    """States that name their position and token: two layers, one head of 2."""
    rows = torch.tensor([[[i, ids[i]]] for i in range(begin, len(ids))], dtype=torch.float32)
    return {tensor_name(i, part): rows + i for i in range(2) for part in ("key", "value")}


class Engine:
    """A vLLM engine of one worker; `during` is awaited in each request."""

    def __init__(self, loader: Any) -> None:
        layout = KVLayout({}, {"m.0.a": 0, "m.1.a": 1}, [BLOCK, BLOCK], [None, WINDOW])
        self.captures, self.requests = CaptureQueue(), cast("list[tuple[int, int, str]]", [])
        self.drafts = EditionDrafts(loader, self.captures, layout)
        parts = {"editions": self.drafts, "captures": self.captures, "loader": loader}
        self.worker = WorkerCalls(cast(Any, SimpleNamespace(**parts)), None)
        self.during: Callable[[], Awaitable[None]] | None = None
        self.calls: list[str] = []
        self.plans: list[LoadParams | None] = []
        self.errored = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        name, arguments, _ = args
        self.calls.append(name)
        return [getattr(self.worker, name)(*arguments)]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
        capture = params.extra_args["kv_transfer_params"][CAPTURE_KEY]
        ids, begin = prompt["prompt_token_ids"], capture["begin"]
        self.requests.append((begin, len(ids), prompt["cache_salt"]))
        asked = params.extra_args["kv_transfer_params"]
        self.plans.append(LoadParams.of(asked, prompt["cache_salt"]))
        if (plan := self.plans[-1]) is not None:
            (part,) = plan.parts
            held = self.drafts.loader.heads[part.memory]
            assert held.ids == ids[: plan.tokens]
            # The shortest prompt after it has its last 7 tokens computed, which see 8 before them.
            first = max(0, plan.tokens - 8 - WINDOW + 1) // BLOCK * BLOCK
            assert [len(rows) for rows in held.keys] == [plan.tokens, plan.tokens - first]
        if self.during is not None:
            await self.during()
        self.captures.capture(capture["name"], lambda: states_at(ids, begin), begin)
        yield None


def editions_of(engine: Engine, **options: Any) -> Editions:
    client = MemoryEngineClient(cast(Any, engine))
    return Editions(client, **{"policy": "idle", "chunk": 8, **options})


def prompt_of(*memories: ResolvedMemory, **fields: Any) -> Prompt:
    return Prompt(memories or (memory(),), **{"tail": 4, "tenant": "acme", **fields})


async def settle(editions: Editions, seconds: float = 5.0) -> None:
    """Wait until nothing is being made."""
    async with asyncio.timeout(seconds):
        while editions.wanted:
            await asyncio.sleep(0.001)


KEY: Key = (DIGEST, EDITION)
