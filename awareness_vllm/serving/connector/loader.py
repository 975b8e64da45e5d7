"""Where a worker's aligned memories come from: host memory, the disk, or an alignment."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.align.paged import PagedMap
from awareness_vllm.align.realign import AlignedMemory, Realignment, copy, sources
from awareness_vllm.errors import AwarenessError, UnsupportedModel
from awareness_vllm.packages.file import Package, read
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.serving.resolver import Memories
from awareness_vllm.serving.tiers import DiskTier, Key, Memory, WarmTier
from awareness_vllm.wmatrix.features import Embed
from awareness_vllm.wmatrix.file import WMatrix

HEADS = 64
"""Heads that are kept: each chat template has one, and each system prompt."""
READERS = 4
"""Files that are read at once: one that hangs holds up no other memory's requests."""
ROWS = 4096
"""Of an embedding that are looked up at once."""
A_MOMENT, AT_ONCE = 0.005, 0.05
"""Seconds to align in a step that others wait for (less than a block takes: it is one block, or any
number of memories that only had to be read), and where nobody does."""


@dataclass(frozen=True)
class Found:
    """A memory as it is kept somewhere, or a package and its tokens (`sources`) to be aligned."""

    memory: Memory | None = None
    package: Package | None = None
    ids: list[int] = field(default_factory=list)
    source: Tensor | None = None


@dataclass
class Alignment:
    """One memory on its way: `found` is read by a thread, `result` is the memory, and "warm" or
    "cold" for how it came. `waiting` counts who wants it."""

    part: Part
    found: Future[tuple[Found, str]]
    result: Future[tuple[Memory, str]] = field(default_factory=Future)
    work: Realignment | None = None
    waiters: int = 1

    @property
    def key(self) -> Key:
        return self.part.memory, self.part.wmatrix


class MemoryLoader:
    """Aligns each memory once, and keeps what was aligned.

    Threads read files; the mathematics is done between the engine's steps, one block of tokens at a
    time. On a CPU a second team of threads on the same cores would take half as long again, and
    hold the model up as much (docs/performance-log.md).
    """

    def __init__(self, config: ServingConfig, memories: Memories, dtype: torch.dtype) -> None:
        self.memories, self.dtype = memories, dtype
        self.warm = WarmTier(int(config.host_cache_gib * 2**30))
        self.disk = (
            DiskTier(
                Path(config.disk_cache),
                int(config.disk_cache_gib * 2**30),
                memories.geometry.weights,
                dtype,
            )
            if config.disk_cache
            else None
        )
        self.readers = ThreadPoolExecutor(READERS, "awareness-read")
        self.under_way: dict[Key, Alignment] = {}
        self.prefetches: dict[str, list[Alignment]] = {}
        self.heads: OrderedDict[str, AlignedMemory] = OrderedDict()
        self.wmatrices: dict[str, WMatrix] = {}
        self.paged: dict[str, PagedMap] = {}
        self.embed: Embed = no_embedding

    def ask(self, part: Part, tenant: str) -> Alignment:
        """A memory, there already or on its way; whoever asks takes it or leaves it."""
        if part.memory in self.heads:
            self.heads.move_to_end(part.memory)
            return there(part, self.heads[part.memory])
        key = (part.memory, part.wmatrix)
        if (memory := self.warm.get(key)) is not None:
            return there(part, memory)
        if (alignment := self.under_way.get(key)) is not None:
            alignment.waiters += 1
            return alignment
        alignment = Alignment(part, self.readers.submit(self.find, part, tenant))
        self.under_way[key] = alignment
        return alignment

    def leave(self, alignment: Alignment) -> None:
        """Want it no more; without anybody else who does, it ends where it is."""
        alignment.waiters -= 1
        if not alignment.waiters and self.under_way.get(alignment.key) is alignment:
            alignment.found.cancel()
            del self.under_way[alignment.key]

    def find(self, part: Part, tenant: str) -> tuple[Found, str]:
        """All of a memory that needs no model, and how it came. Runs in a thread.

        The frontend has proven the file's bytes and found the map; neither is done again here.
        """
        if self.disk and (kept := self.disk.get((part.memory, part.wmatrix))) is not None:
            return Found(kept), "warm"
        package = read(self.memories.stores[tenant].path(part.memory))
        if not part.wmatrix:
            return Found(copy(package)), "cold"
        if part.wmatrix not in self.wmatrices:
            raise UnsupportedModel("the request was resolved with another W-Matrix")
        manifest = self.wmatrices[part.wmatrix].manifest
        return Found(None, package, *sources(package, manifest, self.memories.folder)), "cold"

    def advance(self, seconds: float = A_MOMENT) -> None:
        """Align what has been found, in its order, for about so long: one block at least."""
        until = time.perf_counter() + seconds
        for alignment in [a for a in self.under_way.values() if a.found.done()]:
            while not self.step(alignment):
                if time.perf_counter() >= until:
                    return
            del self.under_way[alignment.key]
            if time.perf_counter() >= until:
                return

    def step(self, alignment: Alignment) -> bool:
        """Align a block; whether the memory is there, or never will be: its askers tell why."""
        try:
            found, temperature = alignment.found.result()
            memory = found.memory or self.block(alignment, found)
            if memory is None:
                return False
            self.warm.put(alignment.key, memory)
            # A latent is decoded faster than its states are read, and a copy is a file already.
            if self.disk and found.memory is None and isinstance(memory, AlignedMemory):
                self.disk.put(alignment.key, memory)
            alignment.result.set_result((memory, temperature))
        except Exception as error:
            alignment.result.set_exception(error)
        return True

    def block(self, alignment: Alignment, found: Found) -> Memory | None:
        """Align a package's next block of tokens; the memory when it is whole."""
        assert found.package is not None
        assert found.source is not None
        digest = alignment.part.wmatrix
        if digest in self.paged:
            return self.paged[digest].latent(found.package, found.ids, found.source, self.embed)
        if alignment.work is None:
            alignment.work = Realignment(
                found.package,
                self.wmatrices[digest],
                found.ids,
                found.source,
                lambda ids: self.embed(ids).cpu(),
                dtype=self.dtype,
            )
        return alignment.work.memory if alignment.work.step() else None

    def prefetch(self, ticket: str, params: LoadParams, pin: bool) -> str:
        """Align memories ahead of their first request, `pin` them in the warm tier.

        Asked again with the same ticket while it answers PENDING; then "warm" or "cold" for how
        they came, or what went wrong: an exception would cross the engine as a mere text.
        """
        if ticket not in self.prefetches:
            self.prefetches[ticket] = [self.ask(part, params.tenant) for part in params.parts]
            if pin:
                self.warm.pinned.update((part.memory, part.wmatrix) for part in params.parts)
        self.advance(AT_ONCE)
        if not all(alignment.result.done() for alignment in self.prefetches[ticket]):
            return PENDING
        try:
            return coldest(a.result.result()[1] for a in self.prefetches.pop(ticket))
        except (AwarenessError, OSError) as error:
            return str(error)

    def evict(self, memory: str) -> bool:
        """Drop a memory from the warm tier, in memory and on disk; whether it was there."""
        on_disk = self.disk.drop(memory) if self.disk else False
        return self.warm.drop(memory) or on_disk

    def keep_head(self, name: str, head: AlignedMemory) -> None:
        """Keep a head that prompts begin with."""
        self.heads[name] = head
        while len(self.heads) > HEADS:
            self.heads.popitem(last=False)


def there(part: Part, memory: Memory) -> Alignment:
    """A memory that nobody has to wait for."""
    alignment = Alignment(part, Future())
    alignment.found.set_result((Found(memory), "warm"))
    alignment.result.set_result((memory, "warm"))
    return alignment


def coldest(temperatures: Iterable[str]) -> str:
    return "cold" if "cold" in set(temperatures) else "warm"


def no_embedding(ids: Tensor) -> Tensor:
    """Raises AwarenessError: nobody lent the model's."""
    raise AwarenessError(
        "the connector has no model to take embeddings from",
        found="no worker extension",
        expected="--worker-extension-cls with the awareness endpoint plugin",
        remedy="start the server with `awareness serve`",
    )


@torch.inference_mode()
def embedding_of(model: Any, rows: int, ranks: int) -> Embed:
    """The running model's own embedding, ids [T] to [T, E] float32.

    Over several ranks a lookup is a collective, and a rank does not know when another one aligns:
    all of them look all `rows` up once, together, and keep the table on the host.
    """
    device = next(model.parameters()).device
    if ranks == 1:
        return lambda ids: model.embed_input_ids(ids.to(device)).float()
    ids = torch.arange(rows, device=device)
    table = torch.cat([model.embed_input_ids(some).cpu() for some in ids.split(ROWS)])
    return lambda ids: table[ids].float()
