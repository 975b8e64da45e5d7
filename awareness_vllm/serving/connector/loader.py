"""A worker's aligned memories: from the warm tier, the disk, or an alignment of its own."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.align.encoding import LatentCopy, LatentEncoding
from awareness_vllm.align.paged import PagedMap
from awareness_vllm.align.realign import AlignedMemory, Realignment, copy, sources
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.errors import (
    AwarenessError,
    MemoryNotFound,
    OutOfDeviceMemory,
    UnsupportedModel,
)
from awareness_vllm.packages.file import AnyPackage, read_ahead, with_states
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.holders import Holders
from awareness_vllm.serving.connector.passages import PassageTier
from awareness_vllm.serving.connector.read_queue import ReadQueue
from awareness_vllm.serving.params import Key, Part, is_edition, is_of
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tenants import stores_of
from awareness_vllm.serving.tiers import DiskTier, Memory, WarmTier
from awareness_vllm.wmatrix.features import Embed
from awareness_vllm.wmatrix.file import WMatrix

GIB = 2**30
MAX_HEADS = 64
"""Heads that are kept: each chat template has one, and each system prompt."""
EMBEDDING_ROWS = 4096
"""Rows of an embedding that are looked up at once."""
STEP_BUDGET_S = 0.005
"""Seconds to align in a step: one block of tokens, which takes longer, or any number of memories
that only had to be read. Other requests wait for a step, and may arrive in an idle one."""
OUT_OF_MEMORY_S = 60.0
"""How long a memory that the device had no room for is not tried again."""


@dataclass(frozen=True)
class LoadedSource:
    """A memory that was aligned before, or a package with the target's ids and the source tokens
    [T] to align it from; `temperature` is "warm" or "cold". The package is hashed while it is
    aligned: what was made of it counts once `check` has not raised PackageCorrupt."""

    temperature: str
    memory: Memory | None = None
    package: AnyPackage | None = None
    ids: list[int] = field(default_factory=list)
    source: Tensor | None = None
    check: Callable[[], None] = lambda: None


@dataclass
class PendingAlignment:
    """One memory on its way: `source` is read by a thread, `result` is the memory and its
    temperature. `waiters` counts the requests for it, `tenants` are those that they came from."""

    part: Part
    source: Future[LoadedSource]
    result: Future[tuple[Memory, str]] = field(default_factory=Future)
    work: Realignment | LatentEncoding | LatentCopy | None = None
    waiters: int = 1
    tenants: set[str] = field(default_factory=set)

    @property
    def key(self) -> Key:
        return self.part.key

    @property
    def begun(self) -> int:
        """The rows that are aligned, or that a device has begun to align."""
        return self.work.begin if self.work else 0

    @property
    def running(self) -> Sequence[Future[Any]]:
        """What goes on beside the engine's steps: chunks on a device, or the read of the source."""
        return self.work.awaited if isinstance(self.work, LatentEncoding) else [self.source]


class MemoryLoader:
    """Aligns each memory once, and keeps the result.

    Threads read files; the mathematics is done between the engine's steps, one block of tokens at a
    time. On a CPU a second team of threads on the same cores would take half as long again, and
    hold the model up as much (docs/performance-log.md).

    Args:
        stores: by tenant.
        dtype: of the target's cache.
        warm, disk: the tiers that keep aligned memories.
        editions: the tier of the model's own states of them in host memory.
        reads: the files that are read, or were read and are not aligned yet.
        passages: what the model has re-read.
    """

    def __init__(
        self,
        model: ServedModel,
        stores: Mapping[str, Store],
        dtype: torch.dtype,
        warm: WarmTier,
        disk: DiskTier | None = None,
        reads: ReadQueue | None = None,
        passages: PassageTier | None = None,
        editions: WarmTier | None = None,
    ) -> None:
        self.model, self.stores, self.dtype = model, stores, dtype
        self.warm, self.disk, self.editions = warm, disk, editions or WarmTier(GIB)
        self.reads = reads or ReadQueue(max_reads=32, max_bytes=GIB)
        self.passages = passages or PassageTier(GIB)
        self.holders = Holders()
        self.pending: dict[Key, PendingAlignment] = {}
        self.heads: OrderedDict[str, AlignedMemory] = OrderedDict()
        self.wmatrices: dict[str, WMatrix] = {}
        self.paged: dict[str, PagedMap] = {}
        self.workspace: DeviceWorkspace | None = None
        self.refused: dict[Key, float] = {}
        self.embed: Embed = no_embedding

    @classmethod
    def from_config(
        cls, config: ServingConfig, model: ServedModel, dtype: torch.dtype
    ) -> MemoryLoader:
        """Raises BadInput: a tenants file that cannot be used."""
        disk = None
        if config.disk_cache is not None:
            limit = int(config.disk_cache_gib * GIB)
            disk = DiskTier(Path(config.disk_cache), limit, model.geometry.weights, dtype)
        warm = WarmTier(int(config.host_cache_gib * GIB))
        reads = ReadQueue(config.max_loads, config.max_load_bytes)
        passages = PassageTier(int(config.reread_cache_gib * GIB))
        editions = WarmTier(int(config.edition_gib * GIB))
        return cls(model, stores_of(config), dtype, warm, disk, reads, passages, editions)

    def workspace_on(self, device: torch.device) -> DeviceWorkspace:
        """What the maps on the KV cache's device share."""
        if self.workspace is None:
            self.workspace = DeviceWorkspace(device, self.model.max_model_len)
        return self.workspace

    def tier(self, key: Key) -> WarmTier:
        """The tier that keeps a memory in host memory."""
        return self.editions if is_edition(key) else self.warm

    def request(self, part: Part, tenant: str) -> PendingAlignment:
        """A memory, ready or on its way; whoever requests it uses its result or releases it."""
        if self.is_refused(part.key):
            return failed(part, out_of_memory(part.key))
        if part.memory in self.heads:
            self.heads.move_to_end(part.memory)
            return completed(part, self.heads[part.memory])
        if (memory := self.tier(part.key).get(part.key)) is not None:
            self.holders.add(part.key, [tenant])
            return completed(part, memory)
        if (alignment := self.pending.get(part.key)) is not None:
            alignment.waiters += 1
            alignment.tenants.add(tenant)
            return alignment
        alignment = PendingAlignment(part, self.read(part, tenant), tenants={tenant})
        self.pending[part.key] = alignment
        return alignment

    @contextlib.contextmanager
    def remembering(self, key: Key) -> Iterator[None]:
        """A memory that the device turns out to have no room for is refused for OUT_OF_MEMORY_S.

        Raises:
            OutOfDeviceMemory
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.refused[key] = time.perf_counter() + OUT_OF_MEMORY_S
            raise out_of_memory(key) from error

    def is_refused(self, key: Key) -> bool:
        """Whether the device had no room for a memory a moment ago."""
        now = time.perf_counter()
        self.refused = {key: until for key, until in self.refused.items() if until > now}
        return key in self.refused

    def read(self, part: Part, tenant: str) -> Future[LoadedSource]:
        """What `read_source` gives, as soon as its bytes fit; whoever asks releases the read."""
        try:
            size = self.source_bytes(part, tenant)
        except (AwarenessError, OSError) as error:
            refused = Future[LoadedSource]()
            refused.set_exception(error)
            return refused
        return self.reads.submit(size, functools.partial(self.read_source, part, tenant))

    def source_bytes(self, part: Part, tenant: str) -> int:
        """Bytes of a package. Raises InvalidMemoryId, MemoryNotFound, PackageTooLarge."""
        return self.stores[tenant].size(part.memory, limit=self.reads.max_bytes)

    def release(self, alignment: PendingAlignment) -> None:
        """Give up a requested memory; without other requests its alignment ends where it is."""
        alignment.waiters -= 1
        if not alignment.waiters and self.pending.get(alignment.key) is alignment:
            del self.pending[alignment.key]
            self.reads.release(alignment.source)

    def read_source(self, part: Part, tenant: str) -> LoadedSource:
        """A memory from the disk tier, or its package, as far as no model is needed. Runs in a
        thread.

        The front end has chosen the map, and read the file with the digest that the plan names.

        Raises:
            MemoryNotFound, PackageCorrupt: the file is another one by now;
            UnsupportedModel: a W-Matrix that this worker does not have.
        """
        if self.disk and (memory := self.disk.get(part.key)) is not None:
            return LoadedSource("warm", memory)
        if is_edition(part.key):
            raise MemoryNotFound(f"the edition of {part.memory} is kept no longer")
        path = self.stores[tenant].path(part.memory)
        package, check = read_ahead(path, part.digest, self.model.largest)
        if not part.wmatrix:
            check()
            return LoadedSource("cold", copy(with_states(package)))
        if part.wmatrix not in self.wmatrices:
            raise UnsupportedModel("the request was resolved with another W-Matrix")
        manifest = self.wmatrices[part.wmatrix].manifest
        ids, source = sources(package, manifest, self.model.folder)
        return LoadedSource("cold", None, package, ids, source, check)

    def advance(self, seconds: float = STEP_BUDGET_S) -> bool:
        """Align memories whose sources are read, in order, for about so long: a block at least, or
        a chunk of each that a device aligns. Whether anything was aligned, or begun."""
        until = time.perf_counter() + seconds
        aligned = False
        for alignment in [a for a in self.pending.values() if a.source.done()]:
            begun = alignment.begun
            complete = self.step(alignment)
            while not (complete or isinstance(alignment.work, LatentEncoding)):
                if time.perf_counter() >= until:
                    return True
                complete = self.step(alignment)
            aligned = aligned or complete or alignment.begun > begun
            if not complete:
                continue
            del self.pending[alignment.key]
            self.reads.release(alignment.source)
            if time.perf_counter() >= until:
                break
        return aligned

    def step(self, alignment: PendingAlignment) -> bool:
        """Align a block; whether the memory is complete, or has failed: its result says why."""
        try:
            source = alignment.source.result()
            with self.remembering(alignment.key):
                memory = source.memory or self.align_block(alignment, source)
            if memory is None:
                return False
            source.check()
            self.tier(alignment.key).put(alignment.key, memory)
            aligned_anew = source.temperature == "cold"
            (self.holders.replace if aligned_anew else self.holders.add)(
                alignment.key, alignment.tenants
            )
            # A latent is decoded faster than its states are read, and a copy is a file already.
            if self.disk and source.memory is None and isinstance(memory, AlignedMemory):
                self.disk.put(alignment.key, memory)
            alignment.result.set_result((memory, source.temperature))
        except Exception as error:
            alignment.result.set_exception(error)
        return True

    def align_block(self, alignment: PendingAlignment, source: LoadedSource) -> Memory | None:
        """Align a package's next block of tokens; the memory when it is complete."""
        assert source.package is not None
        assert source.source is not None
        digest, package = alignment.part.wmatrix, source.package
        on_device = alignment.work is None and digest in self.paged
        if on_device and isinstance(package, LatentPackage):
            alignment.work = LatentCopy(package, self.wmatrices[digest], source.ids)
        elif on_device:
            states = (whole := with_states(package)).keys, whole.values
            alignment.work = LatentEncoding(
                self.paged[digest], *states, source.ids, source.source, self.embed
            )
        elif alignment.work is None:
            alignment.work = Realignment(
                package,
                self.wmatrices[digest],
                source.ids,
                source.source,
                lambda ids: self.embed(ids).cpu(),
                dtype=self.dtype,
            )
        return alignment.work.memory if alignment.work.step() else None

    def loaded(self, memories: Iterable[str]) -> list[str]:
        """Those of these memories whose last load has ended well."""
        kept = {*self.warm.memories, *self.editions.memories}
        keys = {*self.holders.tenants, *kept} - self.pending.keys()
        return [memory for memory in memories if any(is_of(key, memory) for key in keys)]

    def evict(self, memory: str, tenant: str) -> bool:
        """Take a tenant's reference to a memory away, and drop it from the warm tier, in host
        memory and on disk, where no other tenant has loaded it and it is not pinned; whether it
        was there and is dropped."""
        keys = {key for key in {*self.holders.tenants, *self.warm.pinned} if is_of(key, memory)}
        held = [self.holders.remove(key, tenant) for key in keys]
        if any(held) or keys & self.warm.pinned:
            return False
        self.passages.drop(memory)
        on_disk = self.disk.drop(memory) if self.disk else False
        return any([self.warm.drop(memory), self.editions.drop(memory), on_disk])

    def has_edition(self, key: Key) -> bool:
        """Whether an edition is kept, in host memory or on disk."""
        return key in self.editions.memories or (self.disk is not None and self.disk.has(key))

    def keep_edition(self, key: Key, edition: AlignedMemory, tenant: str) -> None:
        """Keep an edition, in host memory and on disk, for the tenant that it was read for."""
        self.editions.put(key, edition)
        self.holders.replace(key, [tenant])
        if self.disk:
            self.disk.put(key, edition)

    def keep_head(self, name: str, head: AlignedMemory) -> None:
        """Keep the states of a chat template's head, which prompts begin with."""
        self.heads[name] = head
        while len(self.heads) > MAX_HEADS:
            self.heads.popitem(last=False)


def completed(part: Part, memory: Memory) -> PendingAlignment:
    """A memory that no request has to wait for."""
    alignment = PendingAlignment(part, Future())
    alignment.source.set_result(LoadedSource("warm", memory))
    alignment.result.set_result((memory, "warm"))
    return alignment


def failed(part: Part, error: Exception) -> PendingAlignment:
    """A memory that is not loaded."""
    alignment = PendingAlignment(part, Future())
    for future in (alignment.source, alignment.result):
        future.set_exception(error)
    return alignment


def out_of_memory(key: Key) -> OutOfDeviceMemory:
    """The error of a load that the device has no room for."""
    return OutOfDeviceMemory(
        f"the device has no room to load {key[0]}",
        expected=f"room for it in {OUT_OF_MEMORY_S:g} s; until then its text is read",
        remedy="a lower --gpu-memory-utilization leaves more beside the KV cache",
    )


def overall_temperature(temperatures: Iterable[str]) -> str:
    """ "cold" where any memory was, else "warm"."""
    return "cold" if "cold" in set(temperatures) else "warm"


def no_embedding(ids: Tensor) -> Tensor:
    """Raises AwarenessError: the worker was not bound to a model."""
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
    table = torch.cat([model.embed_input_ids(some).cpu() for some in ids.split(EMBEDDING_ROWS)])
    return lambda ids: table[ids].float()
