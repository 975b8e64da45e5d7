"""The worker half of the connector: align memories and write them into the paged KV blocks."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.aligner import AlignedMemory, copy, realign
from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.errors import AwarenessError, PackageCorrupt, UnsupportedModel
from awareness_vllm.packages.file import read
from awareness_vllm.positions import shift
from awareness_vllm.serving.captures import Captures, as_memory
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.disk import DiskTier
from awareness_vllm.serving.memories import Memories
from awareness_vllm.serving.pages import (
    check_layers,
    check_rotations,
    layer_index,
    pages_of,
    slice_of_rank,
)
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.serving.readback import read_back
from awareness_vllm.serving.scheduler import SKIP, Load, Save
from awareness_vllm.serving.warm import WarmTier
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.awareness.worker")

WARM_UP_ROWS = 256
"""Rows that a map is tried on at start, so that no request is the first."""
HEADS = 64
"""Heads that are kept: each chat template has one, and each system prompt."""


@dataclass(frozen=True)
class Loaded:
    """What one load did: `temperature` is "hot" (the prefix cache had its first blocks), "warm" (it
    was aligned already) or "cold"; `tokens` and `bytes` were written, in `seconds`."""

    temperature: str
    tokens: int
    bytes: int
    seconds: float


class WorkerHalf:
    """Owns the warm tier and knows where each layer's blocks are."""

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
        self.warm = WarmTier(int(config.host_cache_gib * 2**30))
        self.disk = (
            DiskTier(
                Path(config.disk_cache),
                int(config.disk_cache_gib * 2**30),
                self.memories.geometry.weights,
                self.dtype,
            )
            if config.disk_cache
            else None
        )
        self.wmatrices: dict[str, WMatrix] = {}
        self.paged: dict[str, PagedMap] = {}
        self.captures = Captures(everything=config.capture)
        self.heads: OrderedDict[str, AlignedMemory] = OrderedDict()
        self.model: Any = None
        check_layers(self.memories, self.groups)

    def bind_model(self, model: Any) -> None:
        """Take the running model, for its embedding, and load the W-Matrices that lead to it."""
        check_rotations(model, self.memories.geometry, self.groups)
        self.model = model
        for entry in self.memories.wmatrices:
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
        self.wmatrices[digest] = wmatrix
        device = next(iter(self.layers[name] for name in self.groups)).kv_cache.device
        if device.type != "cuda" or wmatrix.manifest.residual:
            wmatrix.map(None, torch.zeros(WARM_UP_ROWS, wmatrix.manifest.embedding_width))
            return
        heads = {
            layer_index(name): slice_of_rank(
                self.memories.geometry.layers[layer_index(name)].heads,
                self.layers[name].num_kv_heads,
            )
            for name in self.groups
        }
        paged = PagedMap(wmatrix, heads, self.memories.max_model_len, device)
        self.paged[digest] = paged
        paged.warm_up(self.pages())

    def pages(self) -> list[Pages]:
        return [pages_of(self.layers[name]) for name in self.groups]

    @torch.inference_mode()
    def load(self, load: Load) -> Loaded:
        """Write memories' tokens into a request's blocks.

        Raises:
            AwarenessError: a memory cannot be read, or is not what the prompt says.
        """
        started = time.perf_counter()
        slots = [torch.tensor(group, dtype=torch.int64) for group in load.slots]
        temperatures = set()
        first = 0
        for part in load.params.parts:
            begin, end = (
                max(load.begin, first),
                min(load.begin + len(slots[0]), first + part.tokens),
            )
            if begin < end:
                memory, temperature = self.aligned(part, load.params.tenant)
                self.check(memory, part, load.ids[first : first + part.tokens], load.request_id)
                temperatures.add(temperature)
                own = [group[begin - load.begin : end - load.begin] for group in slots]
                # The memory's token of position p stands at p - skip of what comes from it.
                self.place(memory, part, own, begin - first + part.skip, first - part.skip)
            first += part.tokens
        temperature = "hot" if load.begin else coldest(temperatures)
        tokens, seconds = len(slots[0]), time.perf_counter() - started
        logger.info(
            "loaded %s: %d tokens, %s, %.0f ms",
            " ".join(part.memory for part in load.params.parts),
            tokens,
            temperature,
            1e3 * seconds,
        )
        return Loaded(temperature, tokens, self.bytes_in(slots), seconds)

    def check(
        self, memory: AlignedMemory | Latent, part: Part, ids: list[int], request: str
    ) -> None:
        """Refuse a prompt that is not the memory's text: its states would lie."""
        if memory.ids[part.skip :] != ids:
            raise PackageCorrupt(
                f"the prompt of request {request} is not its memory's",
                found=f"{len(ids)} ids",
                expected=f"the {len(memory.ids) - part.skip} ids of {part.memory}",
            )

    def bytes_in(self, slots: list[Tensor]) -> int:
        """Bytes of cache that each KV cache group's slots stand for, in all of its layers."""
        total = 0
        for name, group in self.groups.items():
            cache = self.layers[name].kv_cache  # [B, H, N, K|V]
            slot = cache[0].numel() * cache.element_size() // cache.shape[2]
            total += slot * int((slots[group] != SKIP).sum())
        return total

    def place(
        self,
        memory: AlignedMemory | Latent,
        part: Part,
        slots: list[Tensor],
        begin: int,
        offset: int,
    ) -> None:
        """Write a memory's tokens from its own `begin` on into each KV cache group's slots, moved
        by `offset` positions."""
        if isinstance(memory, Latent):
            by_layer = [slots[group] for group in self.groups.values()]
            paged = self.paged[part.wmatrix]
            paged.write(memory, self.pages(), by_layer, begin, offset)
            return
        for name, group in self.groups.items():
            real = slots[group] != SKIP
            index, end = layer_index(name), begin + len(real)
            key, value = (states[index][begin:end][real] for states in (memory.keys, memory.values))
            positions = self.memories.geometry.layers[index].positions
            self.write(name, shift(key, offset, positions), value, slots[group][real])

    def write(self, name: str, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Scatter one layer's key and value [N, H, D] into slots [N], by vLLM's own operator."""
        if not len(slots):
            return
        layer = self.layers[name]
        heads = slice_of_rank(key.shape[1], layer.num_kv_heads)
        device = layer.kv_cache.device
        layer.impl.do_kv_cache_update(
            layer,
            key[:, heads].to(device, self.dtype).contiguous(),
            value[:, heads].to(device, self.dtype).contiguous(),
            layer.kv_cache,
            slots.to(device),
        )

    def aligned(self, part: Part, tenant: str) -> tuple[AlignedMemory | Latent, str]:
        """The aligned memory, and whether it was warm or came in cold."""
        if part.memory in self.heads:
            self.heads.move_to_end(part.memory)
            return self.heads[part.memory], "warm"
        key = (part.memory, part.wmatrix)
        if (memory := self.warm.get(key)) is not None:
            return memory, "warm"
        if self.disk and (memory := self.disk.get(key)) is not None:
            self.warm.put(key, memory)
            return memory, "warm"
        memory = self.align(part, tenant)
        self.warm.put(key, memory)
        # A latent is decoded faster than its states are read, and a copy is a file already.
        if self.disk and part.wmatrix and isinstance(memory, AlignedMemory):
            self.disk.put(key, memory)
        return memory, "cold"

    def align(self, part: Part, tenant: str) -> AlignedMemory | Latent:
        """Read a package and bring it into the served model's terms.

        The frontend has proven the file's bytes and found the map; neither is done again here.
        """
        package = read(self.memories.stores[tenant].path(part.memory))
        if not part.wmatrix:
            return copy(package)
        if part.wmatrix not in self.wmatrices:
            raise UnsupportedModel("the request was resolved with another W-Matrix")
        folder = self.memories.folder
        if part.wmatrix in self.paged:
            return self.paged[part.wmatrix].latent(package, folder, self.embed)
        wmatrix = self.wmatrices[part.wmatrix]
        return realign(package, wmatrix, folder, self.embed_on_host, dtype=self.dtype)

    def prefetch(self, params: LoadParams, pin: bool) -> str:
        """Align memories ahead of their first request, `pin` them in the warm tier; how warm they
        were, or what went wrong: an exception would cross the engine as a mere text."""
        try:
            found = [self.aligned(part, params.tenant)[1] for part in params.parts]
        except (AwarenessError, OSError) as error:
            return str(error)
        if pin:
            self.warm.pinned.update((part.memory, part.wmatrix) for part in params.parts)
        return coldest(found)

    def evict(self, memory: str) -> bool:
        """Drop a memory from the warm tier, in memory and on disk; whether it was there."""
        on_disk = self.disk.drop(memory) if self.disk else False
        return self.warm.drop(memory) or on_disk

    def save(self, save: Save) -> None:
        """Read a request's states back, where that was announced."""
        if self.captures.expects(save.name):
            states = functools.partial(
                read_back, self.layers, self.groups, self.memories.geometry, save
            )
            self.captures.take(save.name, states)

    def keep_head(self, capture: str, name: str, ids: list[int]) -> str:
        """Keep captured states as the head that prompts begin with; what went wrong, or nothing."""
        try:
            self.heads[name] = as_memory(self.captures.collect(capture), ids)
        except AwarenessError as error:
            return str(error)
        while len(self.heads) > HEADS:
            self.heads.popitem(last=False)
        return ""

    def embed(self, ids: Tensor) -> Tensor:
        """The running model's own embedding, [T] to [T, E] float32 where the model is."""
        if self.model is None:
            raise AwarenessError(
                "the connector has no model to take embeddings from",
                found="no worker extension",
                expected="--worker-extension-cls with the awareness endpoint plugin",
                remedy="start the server with `awareness serve`",
            )
        device = next(self.model.parameters()).device
        return self.model.embed_input_ids(ids.to(device)).float()

    def embed_on_host(self, ids: Tensor) -> Tensor:
        return self.embed(ids).cpu()


def coldest(temperatures: Iterable[str]) -> str:
    return "cold" if "cold" in set(temperatures) else "warm"
