"""The worker half of the connector: write memories into the paged KV blocks as they arrive."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.errors import AwarenessError, LoadTimeout, PackageCorrupt
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.capture_queue import Captures, as_memory
from awareness_vllm.serving.connector.kv_layout import (
    check_layers,
    check_rotations,
    layer_index,
    pages_of,
    slice_of_rank,
)
from awareness_vllm.serving.connector.kv_reader import read_kv
from awareness_vllm.serving.connector.loader import (
    A_MOMENT,
    AT_ONCE,
    Alignment,
    MemoryLoader,
    coldest,
    embedding_of,
)
from awareness_vllm.serving.connector.scheduler import LoadSpec, SaveSpec
from awareness_vllm.serving.params import Part
from awareness_vllm.serving.resolver import Memories
from awareness_vllm.serving.tiers import Memory
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.awareness.worker")

WARM_UP_ROWS = 256
"""Rows that a map is tried on at start, so that no request is the first."""
MOST_LOADED = 8192
"""Tokens written in one step, but for a single load that is longer: while loads are written, the
requests that are being answered wait."""
IDLE_SECONDS = 0.005
"""How long an engine without anything else to do waits for a file before it looks around."""


@dataclass(frozen=True)
class Loaded:
    """What one load did: `temperature` is "hot" (the prefix cache had its first blocks), "warm" (it
    was aligned already) or "cold"; `tokens` and `bytes` were written, in `seconds`."""

    temperature: str
    tokens: int
    bytes: int
    seconds: float


@dataclass
class PendingLoad:
    """A load, since when it is wanted, and its memories, there already or on their way."""

    load: LoadSpec
    since: float
    alignments: list[Alignment]

    @property
    def arrived(self) -> bool:
        return all(alignment.result.done() for alignment in self.alignments)


@dataclass(frozen=True)
class TokenSpan:
    """Positions begin … end-1 of a prompt, from the memory `part`, whose first id is at `first`."""

    part: Part
    first: int
    begin: int
    end: int


class ConnectorWorker:
    """Knows where each layer's blocks are, and which loads wait for their memories."""

    def __init__(
        self, config: ServingConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        model = vllm_config.model_config
        self.memories = Memories(config, model.model, model.max_model_len)
        # A name only in what the user passes; vLLM has resolved it by now.
        self.dtype = cast(torch.dtype, model.dtype)
        self.groups = {
            name: g
            for g, group in enumerate(kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        self.layers = dict(vllm_config.compilation_config.static_forward_context)
        self.embedding = (
            model.get_vocab_size(),
            vllm_config.parallel_config.tensor_parallel_size,
        )
        check_layers(self.memories, self.groups)
        self.writer = self.kv_writer_of(self.memories.geometry)
        self.loader = MemoryLoader(config, self.memories, self.dtype)
        self.deadline = config.load_timeout
        self.pending: dict[str, PendingLoad] = {}
        self.captures = Captures(everything=config.capture)

    def kv_writer_of(self, geometry: Geometry) -> KVWriter:
        """What writes into this process's layers."""
        found = {layer_index(name): self.layers[name] for name in self.groups}
        return KVWriter(
            layers=found,
            groups={layer_index(name): group for name, group in self.groups.items()},
            heads={
                i: slice_of_rank(geometry.layers[i].heads, layer.num_kv_heads)
                for i, layer in found.items()
            },
            geometry=geometry,
            dtype=self.dtype,
        )

    def bind_model(self, model: Any) -> None:
        """Take the running model, for its embedding, and load the W-Matrices that lead to it."""
        check_rotations(model, self.memories.geometry, self.groups)
        self.loader.embed = embedding_of(model, *self.embedding)
        for entry in self.memories.registry:
            if entry.manifest.target.same_model(self.memories.geometry):
                self.prepare(entry.digest, load_wmatrix(entry.path))
                logger.info("W-Matrix %s loaded (%s)", entry.path.name, entry.manifest.standing)
            else:
                logger.warning(
                    "W-Matrix %s leads to %s, not to the served model",
                    entry.path.name,
                    entry.manifest.target.name,
                )

    def prepare(self, digest: str, wmatrix: WMatrix) -> None:
        """Keep a map where it will be used, and use it once.

        On CUDA the fused operators decode straight into the pages. A CPU's pages are packed in ways
        that only vLLM's own operator knows, and a residual map adds to states that it must see.
        """
        self.loader.wmatrices[digest] = wmatrix
        device = next(iter(self.layers[name] for name in self.groups)).kv_cache.device
        if device.type != "cuda" or wmatrix.manifest.residual:
            wmatrix.map(None, torch.zeros(WARM_UP_ROWS, wmatrix.manifest.embedding_width))
            return
        paged = PagedMap(wmatrix, self.writer.heads, self.memories.max_model_len, device)
        self.loader.paged[digest] = paged
        paged.warm_up(self.pages())

    def pages(self) -> list[Pages]:
        return [pages_of(self.layers[name]) for name in self.groups]

    def begin(self, load: LoadSpec) -> None:
        """Want a load; `ready` says when it can be finished."""
        alignments = [self.loader.ask(s.part, load.params.tenant) for s in token_spans(load)]
        self.pending[load.request_id] = PendingLoad(load, time.perf_counter(), alignments)

    def ready(self, *, idle: bool = False) -> list[str]:
        """The requests whose loads can be finished in this step, by writing them or by failing.

        With `idle` there is nothing else to do than to align, or to wait a moment for a file.
        """
        pending = list(self.pending.values())
        if idle and pending and not any(a.found.done() for w in pending for a in w.alignments):
            wait([a.found for w in pending for a in w.alignments], IDLE_SECONDS, FIRST_COMPLETED)
        self.loader.advance(AT_ONCE if idle else A_MOMENT)
        found: list[str] = []
        tokens = 0
        for entry in pending:
            if entry.arrived:
                tokens += len(entry.load.slot_mapping[0])
                if found and tokens > MOST_LOADED:
                    break
            elif time.perf_counter() - entry.since < self.deadline:
                continue
            found.append(entry.load.request_id)
        return found

    def drop(self, request: str) -> bool:
        """Forget the load of a request that has ended; whether there was one."""
        if (entry := self.pending.pop(request, None)) is None:
            return False
        for alignment in entry.alignments:
            self.loader.leave(alignment)
        return True

    @torch.inference_mode()
    def finish(self, request: str) -> Loaded:
        """Write memories' tokens into a request's blocks.

        Raises:
            AwarenessError: a memory cannot be read, is not what the prompt says, or was not aligned
                in time (which goes on: the next request finds it warm).
        """
        entry = self.pending.pop(request)
        load = entry.load
        if not entry.arrived:
            raise LoadTimeout(
                f"the memory of request {request} is not aligned yet",
                found=f"{time.perf_counter() - entry.since:.1f} s",
                expected=f"{self.deadline:g} s at most",
                remedy="pin it, or raise --load-timeout",
            )
        found = [alignment.result.result() for alignment in entry.alignments]
        slot_mapping = [torch.tensor(group, dtype=torch.int64) for group in load.slot_mapping]
        for span, (memory, _) in zip(token_spans(load), found, strict=True):
            self.check(memory, span, load)
            own = [group[span.begin - load.begin : span.end - load.begin] for group in slot_mapping]
            self.place(memory, span, own)
        temperature = "hot" if load.begin else coldest(t for _, t in found)
        tokens, seconds = len(slot_mapping[0]), time.perf_counter() - entry.since
        logger.info(
            "loaded %s: %d tokens, %s, %.0f ms",
            " ".join(part.memory for part in load.params.parts),
            tokens,
            temperature,
            1e3 * seconds,
        )
        return Loaded(temperature, tokens, self.writer.bytes_in(slot_mapping), seconds)

    def check(self, memory: Memory, span: TokenSpan, load: LoadSpec) -> None:
        """Refuse a prompt that is not the memory's text: its states would lie."""
        part, first = span.part, span.first
        if memory.ids[part.skip :] != load.ids[first : first + part.tokens]:
            raise PackageCorrupt(
                f"the prompt of request {load.request_id} is not its memory's",
                found=f"{len(load.ids) - first} ids from {first} on",
                expected=f"the {len(memory.ids) - part.skip} ids of {part.memory}",
            )

    def place(self, memory: Memory, span: TokenSpan, slot_mapping: list[Tensor]) -> None:
        """Write a stretch of a memory into each KV cache group's slots."""
        # The memory's token of position p stands at p + offset.
        offset = span.first - span.part.skip
        begin = span.begin - offset
        if isinstance(memory, Latent):
            by_layer = [slot_mapping[group] for group in self.groups.values()]
            paged = self.loader.paged[span.part.wmatrix]
            paged.write(memory, self.pages(), by_layer, begin, offset)
            return
        self.writer.place(memory.keys, memory.values, begin, offset, slot_mapping)

    def save(self, save: SaveSpec) -> None:
        """Read a request's states back, where that was announced."""
        if self.captures.expects(save.name):
            states = functools.partial(
                read_kv, self.layers, self.groups, self.memories.geometry, save
            )
            self.captures.take(save.name, states)

    def keep_head(self, capture: str, name: str, ids: list[int]) -> str:
        """Keep captured states as the head that prompts begin with; what went wrong, or nothing."""
        try:
            self.loader.keep_head(name, as_memory(self.captures.collect(capture), ids))
        except AwarenessError as error:
            return str(error)
        return ""


def token_spans(load: LoadSpec) -> Iterator[TokenSpan]:
    """The memories that a load takes tokens from, and which."""
    first, last = 0, load.begin + len(load.slot_mapping[0])
    for part in load.params.parts:
        begin, end = max(load.begin, first), min(last, first + part.tokens)
        if begin < end:
            yield TokenSpan(part, first, begin, end)
        first += part.tokens
