"""Admission: how many memories, and how many of their bytes, a server loads at once.

A request counts from here until its response has ended, or until the workers say that its memories
are loaded: they are asked where there is no room. Memories that are known to be warm, or that are
on their way for others, cost nothing more.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from starlette.responses import Response, StreamingResponse

from awareness_vllm.errors import MemoryNotFound, PackageTooLarge, TooManyLoads
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.pulls import Pulls
from awareness_vllm.serving.registry import Offer

MAX_WARM = 4096
"""Memories that are known to be warm; beyond, those used longest ago count as cold."""
ASK_AGAIN_S = 0.1
"""The workers are not asked again sooner: each question is answered between two steps."""

AskWorkers = Callable[[Sequence[str]], Awaitable[set[str]]]
"""Those of some memories that all workers have loaded."""


@dataclass(eq=False)
class Load:
    """One memory of so many bytes on its way, for so many requests."""

    name: str
    bytes: int
    requests: int = 0


class Admission:
    """The loads that a front end has let through.

    Args:
        stores: by tenant.
        ask_workers: asked only where a load does not fit.
        max_loads, max_bytes: of memories on their way; what finds none on its way always fits,
            unless one of its files alone is larger.
        pulls: from the registry, of memories that a tenant's store lacks.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        ask_workers: AskWorkers,
        max_loads: int,
        max_bytes: int,
        pulls: Pulls | None = None,
    ) -> None:
        self.stores, self.ask_workers, self.pulls = stores, ask_workers, pulls
        self.max_loads, self.max_bytes = max_loads, max_bytes
        self.asked = -math.inf
        self.loads: dict[str, Load] = {}
        self.warm: OrderedDict[str, None] = OrderedDict()

    async def admit(self, tenant: str, memories: Sequence[str]) -> Admitted:
        """Let a request of a tenant for these memories through, once all of them are in its store
        or pulled.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageTooLarge; TooManyLoads: there is no room now; of
            the registry, what `Pulls` raises.
        """
        sizes = await asyncio.to_thread(self._sizes, tenant, memories)
        if (pulls := self.pulls) is None:
            return await self._admit(sizes)
        until = pulls.deadline()
        absent = [memory for memory in memories if memory not in sizes]
        offers = await asyncio.gather(*(pulls.look(tenant, memory, until) for memory in absent))
        for offer in offers:
            pulls.check(offer.listing)
        admitted = await self._admit(sizes | {o.listing.id: o.listing.bytes for o in offers})
        try:
            await pulls.pull(tenant, offers, until)
        except BaseException:
            admitted.end()
            raise
        return admitted

    async def offer(self, tenant: str, memory: str) -> Offer | None:
        """What the registry lists of a memory that a tenant's store lacks; None for one that is
        there. Raises as `admit` does."""
        if await asyncio.to_thread(self._sizes, tenant, [memory]):
            return None
        assert self.pulls is not None
        return await self.pulls.look(tenant, memory, self.pulls.deadline())

    def _sizes(self, tenant: str, memories: Sequence[str]) -> dict[str, int]:
        """Bytes of a tenant's memories; without those that the registry may have."""
        sizes, store, pulls = {}, self.stores[tenant], self.pulls
        for memory in memories:
            try:
                size = self.size(tenant, memory)
                if pulls is not None and store.is_pulled(memory):
                    if pulls.is_wanting(memory):
                        continue
                    pulls.note_use(tenant, memory)
            except MemoryNotFound:
                if pulls is None or store.pulled is None:
                    raise
            else:
                sizes[memory] = size
        return sizes

    def size(self, tenant: str, memory: str) -> int:
        """Bytes of a tenant's memory: whoever reads files asks before.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageTooLarge
        """
        return self.stores[tenant].size(memory, limit=self.max_bytes)

    async def admit_capture(self, key: str, size: int) -> Admitted:
        """Let a capture of about `size` bytes through: its states wait in memory for the disk.

        Raises:
            PackageTooLarge: nobody could load it; TooManyLoads: there is no room now.
        """
        if size > self.max_bytes:
            raise PackageTooLarge(
                "this capture would be larger than the server loads",
                found=f"{size / 2**30:.3g} GiB",
                expected=f"{self.max_bytes / 2**30:.3g} GiB at most",
                remedy="capture a shorter text, or start the server with a larger --max-load-gib",
            )
        return await self._admit({key: size})

    def forget(self, memory: str) -> None:
        """Count a memory as cold: it was dropped from the warm tier."""
        self.warm.pop(memory, None)

    async def _admit(self, sizes: Mapping[str, int]) -> Admitted:
        if not self._fits(sizes) and time.monotonic() - self.asked > ASK_AGAIN_S:
            self.asked = time.monotonic()
            for name in await self.ask_workers([*self.loads, *sizes]):
                self.loads.pop(name, None)
                self.mark_warm(name)
        if not self._fits(sizes):
            raise self._refused()
        loads = [
            self.loads.setdefault(name, Load(name, size))
            for name, size in sizes.items()
            if name not in self.warm
        ]
        for load in loads:
            load.requests += 1
        return Admitted(self, loads)

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        cold = sizes.keys() - self.warm.keys() - self.loads.keys()
        new = [sizes[name] for name in cold]
        if not new or not self.loads:
            return True
        total = sum(new) + sum(load.bytes for load in self.loads.values())
        return len(new) + len(self.loads) <= self.max_loads and total <= self.max_bytes

    def _refused(self) -> TooManyLoads:
        total = sum(load.bytes for load in self.loads.values())
        return TooManyLoads(
            "the server is loading as many memories as it may",
            found=f"{len(self.loads)} memories of {total / 2**30:.3f} GiB on their way",
            expected=f"{self.max_loads} memories of {self.max_bytes / 2**30:g} GiB at most",
            remedy="send the request again soon; --max-loads and --max-load-gib set the bounds",
        )

    def mark_warm(self, name: str) -> None:
        """Count a memory as warm until it is dropped."""
        self.warm[name] = None
        self.warm.move_to_end(name)
        while len(self.warm) > MAX_WARM:
            self.warm.popitem(last=False)

    def end(self, load: Load) -> None:
        """One request less for a load."""
        load.requests -= 1
        if not load.requests and self.loads.get(load.name) is load:
            del self.loads[load.name]


@dataclass(eq=False)
class Admitted:
    """One request's loads, none where all of its memories are warm; as a context they end with it,
    and are warm from then on unless it failed."""

    admission: Admission
    loads: list[Load] = field(default_factory=list)

    def end(self, *, warm: bool = False) -> None:
        """Count the loads no longer; once."""
        loads, self.loads = self.loads, []
        for load in loads:
            self.admission.end(load)
            if warm:
                self.admission.mark_warm(load.name)

    def __enter__(self) -> Admitted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(warm=error is None)

    async def until_answered(self, answer: Awaitable[Any]) -> Any:
        """An answer, with whose end, a stream's last chunk, the loads end."""
        try:
            response = await answer
        except BaseException:
            self.end()
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._stream(response.body_iterator)
            # A client that has gone before the first chunk: nothing iterates over the body.
            weakref.finalize(response, self.end)
        else:
            # Without a body it is what vLLM 0.33 answers to a client that has gone.
            answered = isinstance(response, Response) and response.status_code == 200
            self.end(warm=answered and bool(response.body))
        return response

    async def _stream(self, body: Any) -> AsyncIterator[Any]:
        try:
            async for chunk in body:
                yield chunk
            self.end(warm=True)
        finally:
            self.end()
