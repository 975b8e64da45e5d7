"""Copies and heads on a device: written first, then rotated in place, as the CPU's way gives them.

A CPU build of vLLM has no backend with a CUDA backend's layout: the layers' writes are those of
`reference.write`, which vLLM's own scatter is compared with on CUDA (tests/engine/test_scatter.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from awareness_kernels import reference
from paged_stubs import Recorder
from torch import Tensor

from awareness_vllm.align.device_writer import DeviceKVWriter
from awareness_vllm.align.footprint import UPLOAD_BYTES
from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.paged import Pages
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.kernels import ops
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions

pytestmark = pytest.mark.unit

BLOCKS, SIZE, HEADS, DIM = 6, 4, 3, 8
SCHEMES = (
    Positions(scheme="rope", theta=1e4, rotary_dim=8),
    Positions(scheme="yarn", theta=1e4, rotary_dim=4, scale=1.2, interleaved=True, factor=4.0,
              original=32, beta_fast=32.0, beta_slow=1.0),
    Positions(scheme="none"),
)  # fmt: skip
TOKENS = 10


class Update:
    """A backend's write into a cache [B, H, N, K|V], in the order of the log."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        self.log.append(f"write {layer.index}")
        page = pages_of(layer)
        reference.write(page.keys, key.float() / page.key_scale, slots)
        reference.write(page.values, value.float() / page.value_scale, slots)


def pages_of(layer: Any) -> Pages:
    keys, values = layer.kv_cache.transpose(1, 2).split(DIM, dim=-1)
    return Pages(keys, values, 0.5, 2.0)


def made_writer(
    geometry: Geometry, dtype: torch.dtype, log: list[str], schemes: Sequence[Positions] = SCHEMES
) -> KVWriter:
    """A writer into empty layers; the last ones are in the second group. This rank has the last two
    of three heads."""
    described = tuple(LayerGeometry(heads=HEADS, head_dim=DIM, positions=p) for p in schemes)
    layers = {
        i: SimpleNamespace(
            index=i,
            impl=Update(log),
            kv_cache=torch.zeros(BLOCKS, HEADS - 1, SIZE, 2 * DIM, dtype=dtype),
        )
        for i in range(len(schemes))
    }
    groups = {i: min(i, 1) for i in layers}
    heads = dict.fromkeys(layers, slice(1, HEADS))
    model = geometry.model_copy(update={"layers": described})
    return KVWriter(layers, groups, heads, model, torch.bfloat16)


def on_device(writer: KVWriter, device: str = "cpu") -> DeviceKVWriter:
    workspace = DeviceWorkspace(device, 64)
    return DeviceKVWriter.of(
        writer, lambda: [pages_of(x) for x in writer.layers.values()], workspace
    )


def states(count: int, seed: int, layers: int = len(SCHEMES)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, HEADS, DIM, generator=generator).bfloat16() for _ in range(layers)]


def caches(writer: KVWriter) -> list[Tensor]:
    return [layer.kv_cache.view(torch.uint8) for layer in writer.layers.values()]


SLOTS = [torch.tensor([23, 0, 1, 2, 7, 9, 11]), torch.tensor([-1, -1, -1, 4, 5, 6, 20])]


@pytest.mark.parametrize("offset", [0, 5, -2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [2, 1000])
def test_the_device_way_writes_the_same_bytes(
    geometry: Geometry,
    offset: int,
    dtype: torch.dtype,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In eight bits, too, where a rotation of rounded keys would round them twice. In the second
    group, the first tokens are outside the window, and the last layer has lost their rows."""
    from awareness_vllm.align import device_writer

    row = 2 * (HEADS - 1) * DIM * 2
    monkeypatch.setattr(device_writer, "UPLOAD_BYTES", 512 + rows * row)
    keys, values = states(TOKENS, 0), states(TOKENS, 1)
    keys[2], values[2] = keys[2][-6:], values[2][-6:]
    plain, device = (made_writer(geometry, dtype, []) for _ in range(2))
    for writer in (plain, on_device(device)):
        writer.place(keys, values, 1, offset, SLOTS, length=TOKENS)
    for one, other in zip(caches(plain), caches(device), strict=True):
        assert torch.equal(one, other)
        assert one.any()


def test_all_layers_are_rotated_at_once_and_after_they_are_written(
    geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    real = ops.rotate_paged
    monkeypatch.setattr(ops, "rotate_paged", lambda *a: (log.append("rotate"), real(*a))[1])
    writer = on_device(made_writer(geometry, torch.bfloat16, log))
    for staging in writer.workspace.writes:
        staging.stream = Recorder(log)
    keys, values = states(TOKENS, 0), states(TOKENS, 1)
    writer.place(keys, values, 0, 3, [slots[:2] for slots in SLOTS])
    waits = ["mark upload 1", "engine waits for upload 1", "write 0", "mark use 2"]
    assert log == [*waits, "rotate"]  # the second group's tokens have no slots
    log.clear()
    writer.place(keys, values, 0, 0, SLOTS)
    assert [entry for entry in log if entry.startswith("write")] == [
        "write 0",
        "write 1",
        "write 2",
    ]
    assert "rotate" not in log


@pytest.mark.parametrize("schemes", [SCHEMES, (SCHEMES[0], Positions(scheme="learned"))])
def test_a_warm_up_writes_nothing(
    geometry: Geometry, schemes: Sequence[Positions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rotates once where keys can move: with `--jit-monitor-mode=error` no request may."""
    log: list[str] = []
    real = ops.rotate_paged
    monkeypatch.setattr(ops, "rotate_paged", lambda *a: (log.append("rotate"), real(*a))[1])
    writer = made_writer(geometry, torch.bfloat16, log, schemes)
    on_device(writer).warm_up()
    assert log == ["rotate"] * (len(schemes) == len(SCHEMES))
    assert not any(cache.any() for cache in caches(writer))


def test_uploads_are_bounded(geometry: Geometry) -> None:
    """One layer's rows at a time, through the two buffers that all loads use."""
    writer = on_device(made_writer(geometry, torch.bfloat16, [], SCHEMES[:1]))
    count = 2 * UPLOAD_BYTES // (2 * (HEADS - 1) * DIM * 2)
    sizes = [staging.bytes for staging in writer.workspace.writes]
    long = torch.zeros(1, HEADS, DIM, dtype=torch.bfloat16).expand(count, -1, -1)
    nowhere = torch.full((count,), 3)
    writer.place([long], [long], 0, 0, [nowhere])
    assert [staging.bytes for staging in writer.workspace.writes] == sizes == [UPLOAD_BYTES] * 2


def test_learned_positions_are_refused_before_anything_is_written(geometry: Geometry) -> None:
    learned = (SCHEMES[0], Positions(scheme="learned"))
    writer = made_writer(geometry, torch.bfloat16, [], learned)
    keys = states(TOKENS, 0, 2)
    with pytest.raises(UnsupportedModel, match="learned positions"):
        on_device(writer).place(keys, keys, 0, 4, SLOTS)
    assert not any(cache.any() for cache in caches(writer))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offset", [0, 5])
def test_a_cuda_device_writes_what_a_cpu_writes(geometry: Geometry, offset: int) -> None:
    """Pinned uploads, events, and the kernel that rotates in place."""
    keys, values = states(TOKENS, 0), states(TOKENS, 1)
    plain, device = (made_writer(geometry, torch.bfloat16, []) for _ in range(2))
    for layer in device.layers.values():
        layer.kv_cache = layer.kv_cache.cuda()
    for _ in range(3):  # the staging buffers are used again
        for writer in (plain, on_device(device, "cuda")):
            writer.place(keys, values, 1, offset, SLOTS, length=TOKENS)
    for i, layer in plain.layers.items():
        found = device.layers[i].kv_cache.cpu()
        torch.testing.assert_close(found, layer.kv_cache, rtol=2**-7, atol=2**-7)
