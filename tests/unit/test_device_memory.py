"""The room that maps have beside vLLM's KV cache: what does not fit is refused at start, by the
utilisation that fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.align.footprint import device_bytes
from awareness_vllm.errors import OutOfDeviceMemory
from awareness_vllm.serving.connector import device_memory
from awareness_vllm.serving.connector.device_memory import (
    GIB,
    DeviceMemory,
    check_device_memory,
    served_maps,
)
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry

pytestmark = pytest.mark.unit

MIB = 2**20


def planned(
    total: int, weights: int, context: int, activations: int, utilization: float
) -> DeviceMemory:
    """A device as vLLM leaves it before it allocates the cache: of its share, what the weights, a
    step and 1 % for CUDA graphs leave."""
    graphs = total // 100
    free = total - context - weights
    cache = int(total * utilization) - weights - activations - graphs
    return DeviceMemory(total, free, weights, activations, cache, utilization)


H100 = planned(80 * GIB, 16 * GIB, GIB, 2 * GIB, 0.9)


def test_what_vllm_leaves_is_what_maps_may_take() -> None:
    """A tenth of the card, less the context: not what CUDA graphs will take of vLLM's share."""
    assert H100.spare == pytest.approx(7 * GIB, abs=MIB)
    H100.check(H100.spare, 1)
    with pytest.raises(OutOfDeviceMemory, match=r"--gpu-memory-utilization 0\.89"):
        H100.check(H100.spare + 1, 1)


@given(
    total=st.integers(8, 192),
    weights=st.floats(0.1, 0.4),
    utilization=st.floats(0.6, 0.99),
    needed=st.floats(0.01, 0.5),
)
def test_the_utilisation_that_is_named_fits(
    total: int, weights: float, utilization: float, needed: float
) -> None:
    size = total * GIB
    bytes_needed = int(size * needed)
    before = planned(size, int(size * weights), size // 50, size // 50, utilization)
    missing = bytes_needed - before.spare
    if missing <= 0:
        before.check(bytes_needed, 2)
        return
    with pytest.raises(OutOfDeviceMemory) as caught:
        before.check(bytes_needed, 2)
    named = re.search(r"--gpu-memory-utilization (\d\.\d\d)", str(caught.value))
    assert (named is None) == (missing >= before.cache)
    if named is not None:
        share = float(named[1])
        assert utilization - share - missing / size <= 0.01 + 1e-6
        after = planned(size, int(size * weights), size // 50, size // 50, share)
        after.check(bytes_needed, 2)


def test_a_cache_of_a_given_size_is_named_in_bytes() -> None:
    given_size = replace(H100, utilization=None)
    assert given_size.spare == 80 * GIB - GIB - 16 * GIB - 2 * GIB - H100.cache
    named = f"a KV cache of {H100.cache - GIB} bytes .--kv-cache-memory-bytes"
    with pytest.raises(OutOfDeviceMemory, match=named):
        given_size.check(given_size.spare + GIB, 1)


@pytest.fixture
def config(wmatrix: WMatrix) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=64),
        cache_config=SimpleNamespace(
            kv_cache_memory_bytes=None, num_gpu_blocks_override=None, gpu_memory_utilization=0.9
        ),
    )


def test_the_maps_that_lead_to_the_model_are_counted_as_they_will_lie_there(
    wmatrix: WMatrix, tmp_path: Path
) -> None:
    short = replace(wmatrix, encode=wmatrix.encode.half(), decode=wmatrix.decode.half())
    other = wmatrix.manifest.target.model_copy(update={"weights": "other"})
    elsewhere = wmatrix.manifest.model_copy(update={"target": other})
    for name, map_ in {
        "a": wmatrix,
        "b": short,
        "c": wmatrix.to_int8(),
        "d": replace(wmatrix, manifest=elsewhere),
    }.items():
        map_.save(tmp_path / f"{name}.wmatrix")
    maps = served_maps(Registry.read([tmp_path]), wmatrix.manifest.target)
    assert [itemsize for _, itemsize in maps] == [4, 2, 2]


def test_a_start_is_refused_before_anything_is_allocated(
    wmatrix: WMatrix, tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    wmatrix.save(tmp_path / "a.wmatrix")
    registry, geometry = Registry.read([tmp_path]), wmatrix.manifest.target
    heads = {i: slice(None) for i in range(3)}
    needed = device_bytes([(wmatrix.manifest, 4)], heads, 64)
    arguments = (registry, geometry, heads, config, SimpleNamespace(kv_cache_tensors=[]))
    check_device_memory(*arguments)  # a CPU: nothing to measure
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    for spare in (needed, needed - 1):
        memory = DeviceMemory(GIB + spare, GIB + spare, 0, 0, GIB, None)
        monkeypatch.setattr(DeviceMemory, "measure", lambda *args, memory=memory: memory)
        if spare == needed:
            check_device_memory(*arguments)
            continue
        with pytest.raises(OutOfDeviceMemory, match="1 W-Matrices"):
            check_device_memory(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_devices_memory_is_measured(config: Any) -> None:
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    tensors = [SimpleNamespace(size=5), SimpleNamespace(size=5)]
    found = device_memory.DeviceMemory.measure(config, SimpleNamespace(kv_cache_tensors=tensors))
    assert found.cache == 5
    assert found.reserved >= held.nbytes
    assert 0 < found.free < found.total
