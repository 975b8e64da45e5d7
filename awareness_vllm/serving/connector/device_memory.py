"""The device memory that maps need beside vLLM's KV cache, checked before the cache is taken.

vLLM makes a worker's connector in `initialize_from_config` (0.32: v1/worker/gpu_worker.py): the
model was profiled by then and the cache's size is decided, but not allocated. What the maps would
lack then, no request gets back later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from awareness_vllm.align.footprint import device_bytes
from awareness_vllm.errors import OutOfDeviceMemory
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.tensor_file import read_header
from awareness_vllm.wmatrix.manifest import WMatrixManifest, refusing
from awareness_vllm.wmatrix.registry import Registry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

GIB = 2**30
STEP = 100
"""Steps of --gpu-memory-utilization that a remedy is rounded down to, per unit."""


@dataclass(frozen=True)
class DeviceMemory:
    """A device's bytes when the KV cache is about to be allocated: `total` and `free`; `reserved`
    by this process's tensors; `activations`, what a step needs beside them at most; `cache`, the
    KV cache's. `utilization` is the share of `total` that vLLM plans with, None where the cache's
    size was given instead."""

    total: int
    free: int
    reserved: int
    activations: int
    cache: int
    utilization: float | None

    @classmethod
    def measure(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> DeviceMemory:
        """The current CUDA device's."""
        from vllm.utils.mem_utils import MemorySnapshot

        now, cache = MemorySnapshot(), vllm_config.cache_config
        given = cache.kv_cache_memory_bytes or cache.num_gpu_blocks_override
        return cls(
            total=now.total_memory,
            free=now.free_memory,
            reserved=now.torch_memory,
            activations=max(0, now.torch_peak - now.torch_allocated),
            # All of its tensors are parts of one allocation.
            cache=max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0),
            utilization=None if given else cache.gpu_memory_utilization,
        )

    @property
    def spare(self) -> int:
        """The bytes that are left beside the cache and a step's activations, and beside what vLLM
        keeps within its share for CUDA graphs."""
        left = self.free - self.cache - self.activations
        if self.utilization is None:
            return left
        share = math.ceil(self.total * self.utilization)
        return min(left, self.free + self.reserved - share)

    def check(self, needed: int, maps: int) -> None:
        """Refuse at start maps that do not fit, by the utilisation that they fit with.

        Args:
            needed: bytes of so many `maps`.

        Raises:
            OutOfDeviceMemory
        """
        if needed <= self.spare:
            return
        raise OutOfDeviceMemory(
            f"memories and {maps} W-Matrices do not fit beside the KV cache",
            found=f"{max(0, self.spare) / GIB:.2f} GiB left of {self.total / GIB:.1f}",
            expected=f"{needed / GIB:.2f} GiB, the loads' buffers included",
            remedy=self.remedy(needed - self.spare),
        )

    def remedy(self, missing: int) -> str:
        """How the device has `missing` bytes more beside the cache."""
        if missing >= self.cache:
            return "serve fewer W-Matrices, or ones of a lower rank: no smaller KV cache is enough"
        if self.utilization is None:
            return f"a KV cache of {self.cache - missing} bytes (--kv-cache-memory-bytes)"
        fitting = math.floor(STEP * (self.utilization - missing / self.total)) / STEP
        return f"--gpu-memory-utilization {fitting:.2f}"


def check_device_memory(
    registry: Registry,
    geometry: Geometry,
    heads: Mapping[int, slice],
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
) -> None:
    """Refuse at start what the maps would take of a CUDA device that has no room for it; elsewhere
    they are in host memory.

    Raises:
        OutOfDeviceMemory
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return
    maps = served_maps(registry, geometry)
    needed = device_bytes(maps, heads, vllm_config.model_config.max_model_len)
    DeviceMemory.measure(vllm_config, kv_cache_config).check(needed, len(maps))


def served_maps(registry: Registry, geometry: Geometry) -> list[tuple[WMatrixManifest, int]]:
    """The maps that are kept on the device, with the bytes of a number of their products there: a
    residual map stays on the host."""
    return [
        (entry.manifest, product_bytes(entry.path.resolve(), entry.manifest))
        for entry in registry
        if entry.manifest.target.same_model(geometry) and not entry.manifest.residual
    ]


def product_bytes(path: Path, manifest: WMatrixManifest) -> int:
    """The bytes of a number of a map's products once it is loaded. Raises WMatrixCorrupt."""
    if manifest.quantization:
        return torch.bfloat16.itemsize
    with refusing(path):
        dtype: torch.dtype = getattr(torch, read_header(path).tensors["encode"].dtype)
        return dtype.itemsize
