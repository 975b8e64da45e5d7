"""The worker half of the connector: write memories into the paged KV blocks as they arrive."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.device_writer import DeviceKVWriter
from awareness_vllm.align.encoding import warm_up
from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.paged import Latent, PagedMap
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import AwarenessError, LoadTimeout, PackageCorrupt
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.canary import Canary
from awareness_vllm.serving.connector.capture_queue import CaptureQueue, keys_and_values
from awareness_vllm.serving.connector.device_memory import check_device_memory
from awareness_vllm.serving.connector.editions import EditionDrafts
from awareness_vllm.serving.connector.kv_layout import (
    KVLayout,
    check_rotations,
    layer_index,
    slice_of_rank,
)
from awareness_vllm.serving.connector.kv_reader import block_layout, read_kv
from awareness_vllm.serving.connector.loader import (
    MemoryLoader,
    PendingAlignment,
    embedding_of,
    no_embedding,
    overall_temperature,
)
from awareness_vllm.serving.connector.passages import PassageRows
from awareness_vllm.serving.connector.prefetcher import Prefetcher
from awareness_vllm.serving.connector.scheduler import LoadSpec, SaveSpec
from awareness_vllm.serving.params import Part
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tiers import Memory
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix
from awareness_vllm.wmatrix.registry import Registry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.awareness.worker")

WARM_UP_ROWS = 256
"""Rows that a map is tried on at start, so that no request is the first."""
MAX_TOKENS_PER_STEP = 8192
"""Tokens written in one step, but for a single load that is longer: while loads are written, the
requests that are being answered wait."""
IDLE_WAIT_S = 0.005
"""How long an engine without anything else to do waits for a file before it looks around."""


@dataclass(frozen=True)
class Loaded:
    """A load's outcome: `temperature` is "hot" (the prefix cache had its first blocks), "warm" (it
    was aligned already) or "cold"; `tokens` and `bytes` were written, in `seconds`."""

    temperature: str
    tokens: int
    bytes: int
    seconds: float


@dataclass
class PendingLoad:
    """A load, the time at which it was requested, and its memories, ready or on their way."""

    load: LoadSpec
    since: float
    alignments: list[PendingAlignment]

    @property
    def ready(self) -> bool:
        return all(alignment.result.done() for alignment in self.alignments)


@dataclass(frozen=True)
class TokenSpan:
    """Positions begin … end-1 of a prompt, from the memory `part`, whose first id is at `first`."""

    part: Part
    first: int
    begin: int
    end: int


class ConnectorWorker:
    """Loads that wait for their memories, and the KV cache that they are written to.

    Args:
        dtype: of the KV cache.
        registry: the W-Matrices at hand; those that lead to the model are loaded by `load_maps`.
        load_timeout: seconds after which a load fails.
        ranks: of tensor parallelism.
    """

    def __init__(
        self,
        model: ServedModel,
        layout: KVLayout,
        dtype: torch.dtype,
        loader: MemoryLoader,
        captures: CaptureQueue,
        registry: Registry,
        *,
        load_timeout: float,
        ranks: int = 1,
    ) -> None:
        layout.check(model.geometry)
        self.model, self.layout, self.loader, self.captures = model, layout, loader, captures
        self.registry, self.load_timeout, self.ranks = registry, load_timeout, ranks
        by_index = {layer_index(name): layer for name, layer in layout.layers.items()}
        self.writer = KVWriter(
            layers=by_index,
            groups={layer_index(name): group for name, group in layout.groups.items()},
            heads={
                i: slice_of_rank(model.geometry.layers[i].heads, layer.num_kv_heads)
                for i, layer in by_index.items()
            },
            geometry=model.geometry,
            dtype=dtype,
        )
        # Rows that this rank has read back are its own heads' already.
        self.own_writer = dataclasses.replace(
            self.writer, heads=dict.fromkeys(by_index, slice(None))
        )
        self.prefetcher = Prefetcher(loader)
        self.pending: dict[str, PendingLoad] = {}
        self.canary = Canary(loader, captures)
        self.editions = EditionDrafts(loader, captures, layout)

    @classmethod
    def from_vllm(
        cls, config: ServingConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> ConnectorWorker:
        """The worker of a vLLM process. Of the configuration it reads the model, the tenants' store
        folders and the W-Matrices.

        Each W-Matrix is hashed here as in the front end: a request names its map by that digest, so
        a file that was replaced in between is refused, not used under another one's name.

        Raises:
            OutOfDeviceMemory: the W-Matrices do not fit beside the KV cache.
        """
        model = ServedModel.of(vllm_config)
        # A name only in what the user passes; vLLM has resolved it by now.
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)
        worker = cls(
            model,
            KVLayout.from_vllm(vllm_config, kv_cache_config, len(model.geometry.layers)),
            dtype,
            MemoryLoader.from_config(config, model, dtype),
            CaptureQueue(),
            Registry.read(config.wmatrices),
            load_timeout=config.load_timeout,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
        )
        served, heads = worker.registry, worker.writer.heads
        check_device_memory(served, model.geometry, heads, vllm_config, kv_cache_config)
        device = torch.empty(0, device=vllm_config.device_config.device).device
        worker.use_device(device)
        worker.load_maps(device)
        return worker

    def use_device(self, device: torch.device) -> None:
        """On CUDA, copies and heads are uploaded through the device's staging buffers."""
        if device.type == "cuda":
            workspace = self.loader.workspace_on(device)
            self.writer, self.own_writer = (
                DeviceKVWriter.of(writer, self.layout.pages, workspace)
                for writer in (self.writer, self.own_writer)
            )

    def load_maps(self, device: torch.device) -> None:
        """Load the W-Matrices that lead to the model, before the KV cache is allocated, and outside
        of the memory pools around it, which vLLM's sleep mode empties."""
        for entry in self.registry:
            if entry.manifest.target.same_model(self.model.geometry):
                self.keep_map(entry.digest, load_wmatrix(entry.path, digest=entry.digest), device)
                logger.info("W-Matrix %s loaded (%s)", entry.path.name, entry.manifest.standing)
            else:
                logger.warning(
                    "W-Matrix %s leads to %s, not to the served model",
                    entry.path.name,
                    entry.manifest.target.name,
                )

    def keep_map(self, digest: str, wmatrix: WMatrix, device: torch.device) -> None:
        """Keep a map where it will be used.

        On CUDA the fused operators decode straight into the pages. A CPU's pages are packed in ways
        that only vLLM's own operator knows, and a residual map adds to states that it must see.
        """
        self.loader.wmatrices[digest] = wmatrix
        if device.type == "cuda" and not wmatrix.manifest.residual:
            workspace = self.loader.workspace_on(device)
            self.loader.paged[digest] = PagedMap(wmatrix, self.writer.heads, workspace)

    def warm_up(self) -> None:
        """Use each map once, as soon as there is a KV cache: no request is the first, and nothing
        is compiled once vLLM watches for that (`--jit-monitor-mode`)."""
        if isinstance(self.writer, DeviceKVWriter):
            self.writer.warm_up()
        for digest, wmatrix in self.loader.wmatrices.items():
            if digest in self.loader.paged:
                warm_up(self.loader.paged[digest], self.layout.pages())
            else:
                wmatrix.map(None, torch.zeros(WARM_UP_ROWS, wmatrix.manifest.embedding_width))

    def bind_model(self, model: Any) -> None:
        """Take the running model, for its embedding; once, however many API servers ask.

        Raises:
            UnsupportedModel: it rotates its keys otherwise than its config says.
        """
        if self.loader.embed is no_embedding:
            geometry = self.model.geometry
            check_rotations(model, geometry, self.layout.groups)
            self.loader.embed = embedding_of(model, geometry.vocab_size, self.ranks)

    def begin(self, load: LoadSpec) -> None:
        """Request a load's memories; `ready` says when it can be finished."""
        alignments = [self.loader.request(s.part, load.params.tenant) for s in token_spans(load)]
        self.pending[load.request_id] = PendingLoad(load, time.perf_counter(), alignments)

    def ready(self, *, idle: bool = False) -> list[str]:
        """The requests whose loads can be finished in this step, by writing them or by failing.

        With `idle` there is nothing else to do than to align, or to wait a moment for a file.
        """
        pending = list(self.pending.values())
        running = [f for entry in pending for a in entry.alignments for f in a.running]
        if idle and pending and not any(future.done() for future in running):
            wait(running, IDLE_WAIT_S, FIRST_COMPLETED)
        self.loader.advance()
        self.prefetcher.stepped = time.perf_counter()
        requests: list[str] = []
        tokens = 0
        for entry in pending:
            if entry.ready:
                tokens += entry.load.end - entry.load.begin
                if requests and tokens > MAX_TOKENS_PER_STEP:
                    break
            elif time.perf_counter() - entry.since < self.load_timeout:
                continue
            requests.append(entry.load.request_id)
        return requests

    def cancel(self, request: str) -> bool:
        """Forget the load of a request that has ended, and what was read back of its passage;
        whether there was a load."""
        self.captures.discard(request)
        if (entry := self.pending.pop(request, None)) is None:
            return False
        for alignment in entry.alignments:
            self.loader.release(alignment)
        return True

    @torch.inference_mode()
    def finish(self, request: str) -> Loaded:
        """Write memories' tokens into a request's blocks.

        Raises:
            AwarenessError: a memory cannot be read, is not what the prompt says, lacks a passage
                to lay over, or was not aligned in time (which goes on: the next request finds it
                warm).
        """
        entry = self.pending.pop(request)
        load = entry.load
        if not entry.ready:
            raise LoadTimeout(
                f"the memory of request {request} is not aligned yet",
                found=f"{time.perf_counter() - entry.since:.1f} s",
                expected=f"{self.load_timeout:g} s at most",
                remedy="pin it, or raise --load-timeout",
            )
        results = [alignment.result.result() for alignment in entry.alignments]
        slot_mappings = self.layout.slot_mappings(load.block_ids, load.begin, load.end)
        for span, (memory, _) in zip(token_spans(load), results, strict=True):
            check_ids(memory, span, load)
            part = slice(span.begin - load.begin, span.end - load.begin)
            slots = [group[part] for group in slot_mappings]
            with self.loader.remembering(span.part.key):
                self.write(memory, span, slots)
                self.lay_over(span, slots)
        temperature = "hot" if load.begin else overall_temperature(t for _, t in results)
        tokens, seconds = load.end - load.begin, time.perf_counter() - entry.since
        logger.info(
            "loaded %s: %d tokens, %s, %.0f ms",
            " ".join(part.memory for part in load.params.parts),
            tokens,
            temperature,
            1e3 * seconds,
        )
        return Loaded(temperature, tokens, self.writer.bytes_in(slot_mappings), seconds)

    def write(self, memory: Memory, span: TokenSpan, slot_mappings: list[Tensor]) -> None:
        """Write a span of a memory into each KV cache group's slots [N]."""
        # The memory's token of position p stands at p + offset.
        offset = span.first - span.part.skip
        begin = span.begin - offset
        if isinstance(memory, Latent):
            by_layer = [slot_mappings[group] for group in self.layout.groups.values()]
            paged = self.loader.paged[span.part.wmatrix]
            paged.write(memory, self.layout.pages(), by_layer, begin, offset)
            return
        length = len(memory.ids)
        self.writer.place(memory.keys, memory.values, begin, offset, slot_mappings, length=length)

    def lay_over(self, span: TokenSpan, slot_mappings: list[Tensor]) -> None:
        """Write the rows of the passages that a span's memory has re-read into the span's slots.

        Raises:
            PassageMissing
        """
        offset = span.first - span.part.skip
        for reread in span.part.rereads:
            first = reread[0] + offset
            begin, end = max(first, span.begin), min(reread[1] + offset, span.end)
            if begin < end:
                rows = self.loader.passages.get((span.part.key, reread))
                part = slice(begin - span.begin, end - span.begin)
                slots = [group[part] for group in slot_mappings]
                self.own_writer.place(rows.keys, rows.values, begin - first, offset, slots)

    def save(self, save: SaveSpec) -> None:
        """Read back what a step computed of a request, where that was announced, or of a passage.

        Raises:
            AwarenessError: a passage's rows cannot be read back.
        """
        passage, last = save.passage, save.end == save.tokens
        if passage is not None:
            self.captures.announced[save.name] = None
        if self.captures.expects(save.name):
            whole = passage is None
            read = functools.partial(read_kv, self.layout, self.model.geometry, save, whole=whole)
            self.captures.capture(save.name, read, save.begin, last=last)
        if passage is not None and last:
            rows = PassageRows.of(self.captures.collect(save.name))
            self.loader.passages.put(passage, rows)

    def check_read_back(self) -> str:
        """ "", or why this worker cannot read its cache back, so that nothing can be re-read."""
        try:
            for layer in self.layout.layers.values():
                block_layout(layer, "key"), block_layout(layer, "value")
        except Exception as error:
            return str(error) or type(error).__name__
        return ""

    def keep_head(self, capture: str, name: str, ids: list[int]) -> str:
        """Keep captured states as the head that prompts begin with; the error's message, or ""."""
        try:
            states = self.captures.collect(capture)
        except AwarenessError as error:
            return str(error)
        self.loader.keep_head(name, AlignedMemory(ids, *keys_and_values(states, len(states) // 2)))
        return ""


def check_ids(memory: Memory, span: TokenSpan, load: LoadSpec) -> None:
    """Refuse a prompt that is not the memory's text: its states would be those of another text.

    Raises:
        PackageCorrupt
    """
    part, first = span.part, span.first
    # A passage's request takes a memory's beginning.
    if memory.ids[part.skip : part.skip + part.tokens] != load.ids[first : first + part.tokens]:
        raise PackageCorrupt(
            f"the prompt of request {load.request_id} is not its memory's",
            found=f"{len(load.ids) - first} ids from {first} on",
            expected=f"the {len(memory.ids) - part.skip} ids of {part.memory}",
        )


def token_spans(load: LoadSpec) -> Iterator[TokenSpan]:
    """The spans of a load, one for each memory that it takes tokens from."""
    first = 0
    for part in load.params.parts:
        begin, end = max(load.begin, first), min(load.end, first + part.tokens)
        if begin < end:
            yield TokenSpan(part, first, begin, end)
        first += part.tokens
