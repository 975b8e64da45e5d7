"""The worker half of the connector: align memories and write them into the paged KV blocks."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.aligner import AlignedMemory, copy, realign
from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.errors import AwarenessError, PackageCorrupt, UnsupportedModel
from awareness_vllm.packages.file import read
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.memories import LoadParams, Memories
from awareness_vllm.serving.scheduler import SKIP, Load
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.awareness.worker")

LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")
FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM keeps float8 as bytes; its names of the formats."""
WARM_UP_ROWS = 256
"""Rows that a map is tried on at start, so that no request is the first."""


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
        self.wmatrices: dict[str, WMatrix] = {}
        self.paged: dict[str, PagedMap] = {}
        self.model: Any = None
        check_layers(self.memories, self.groups)

    def bind_model(self, model: Any) -> None:
        """Take the running model, for its embedding, and load the W-Matrices that lead to it."""
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
        """Each layer's pages, as the CUDA backends lay them out: [B, H, N, K|V]."""
        found = []
        for name in self.groups:
            layer = self.layers[name]
            cache = layer.kv_cache
            if cache.dtype == torch.uint8:
                cache = cache.view(FLOAT8.get(layer.kv_cache_dtype, torch.float8_e4m3fn))
            keys, values = cache.transpose(1, 2).split(layer.head_size, dim=-1)
            found.append(Pages(keys, values, layer._k_scale_float, layer._v_scale_float))
        return found

    @torch.inference_mode()
    def load(self, load: Load) -> Loaded:
        """Write one memory's tokens into a request's blocks.

        Raises:
            AwarenessError: the memory cannot be read, or is not what the prompt says.
        """
        started = time.perf_counter()
        memory, temperature = self.aligned(load)
        if memory.ids != load.ids:
            raise PackageCorrupt(
                f"the prompt of request {load.request_id} is not its memory's",
                found=f"{len(load.ids)} ids",
                expected=f"the {len(memory.ids)} ids of {load.params.memory}",
            )
        slots = [torch.tensor(group, dtype=torch.int64) for group in load.slots]
        if isinstance(memory, Latent):
            by_layer = [slots[group] for group in self.groups.values()]
            self.paged[load.params.wmatrix].write(memory, self.pages(), by_layer, load.begin)
        else:
            self.place(memory, slots, load.begin)
        tokens, seconds = len(slots[0]), time.perf_counter() - started
        logger.info(
            "loaded %s: %d tokens, %s, %.0f ms",
            load.params.memory,
            tokens,
            temperature,
            1e3 * seconds,
        )
        return Loaded("hot" if load.begin else temperature, tokens, self.bytes_in(slots), seconds)

    def bytes_in(self, slots: list[Tensor]) -> int:
        """Bytes of cache that each KV cache group's slots stand for, in all of its layers."""
        total = 0
        for name, group in self.groups.items():
            cache = self.layers[name].kv_cache  # [B, H, N, K|V]
            slot = cache[0].numel() * cache.element_size() // cache.shape[2]
            total += slot * int((slots[group] != SKIP).sum())
        return total

    def place(self, memory: AlignedMemory, slots: list[Tensor], begin: int) -> None:
        """Write a memory's tokens from `begin` on into each KV cache group's slots."""
        for name, group in self.groups.items():
            real = slots[group] != SKIP
            index, end = layer_index(name), begin + len(real)
            key, value = (part[index][begin:end][real] for part in (memory.keys, memory.values))
            self.write(name, key, value, slots[group][real])

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

    def aligned(self, load: Load) -> tuple[AlignedMemory | Latent, str]:
        """The aligned memory, and whether it was warm or came in cold."""
        key = (load.params.memory, load.params.wmatrix)
        if (memory := self.warm.get(key)) is not None:
            return memory, "warm"
        memory = self.align(load.params)
        self.warm.put(key, memory)
        return memory, "cold"

    def align(self, params: LoadParams) -> AlignedMemory | Latent:
        """Read a package and bring it into the served model's terms.

        The frontend has proven the file's bytes and found the map; neither is done again here.
        """
        package = read(self.memories.store.path(params.memory))
        if not params.wmatrix:
            return copy(package)
        if params.wmatrix not in self.wmatrices:
            raise UnsupportedModel("the request was resolved with another W-Matrix")
        folder = self.memories.folder
        if params.wmatrix in self.paged:
            return self.paged[params.wmatrix].latent(package, folder, self.embed)
        wmatrix = self.wmatrices[params.wmatrix]
        return realign(package, wmatrix, folder, self.embed_on_host, dtype=self.dtype)

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


class WarmTier:
    """Aligned memories in host memory, least recently used out first, bounded in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.memories: OrderedDict[tuple[str, str], AlignedMemory | Latent] = OrderedDict()

    def get(self, key: tuple[str, str]) -> AlignedMemory | Latent | None:
        if key in self.memories:
            self.memories.move_to_end(key)
        return self.memories.get(key)

    def put(self, key: tuple[str, str], memory: AlignedMemory | Latent) -> None:
        self.memories[key] = memory
        while len(self.memories) > 1 and sum(m.bytes for m in self.memories.values()) > self.limit:
            self.memories.popitem(last=False)


def layer_index(name: str) -> int:
    """The index of a layer in the model, from vLLM's name of its attention module."""
    match = LAYER_INDEX.search(name)
    if match is None:
        raise UnsupportedModel(
            "cannot tell a layer's index",
            found=name,
            expected="a name like model.layers.7.self_attn",
        )
    return int(match[1])


def check_layers(memories: Memories, groups: dict[str, int]) -> None:
    """Refuse at start a server whose cached layers are not those of the model's geometry."""
    found = sorted(layer_index(name) for name in groups)
    if not set(found) <= set(range(len(memories.geometry.layers))):
        raise UnsupportedModel(
            "the server's KV cache has other layers than the model's config",
            found=found,
            expected=f"0 … {len(memories.geometry.layers) - 1}",
        )


def slice_of_rank(total: int, local: int) -> slice:
    """This tensor-parallel rank's KV heads; replicated where ranks outnumber them."""
    if total == local:
        return slice(None)
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    begin = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return slice(begin, begin + local)
