"""What maps share on a device: one table for each positional descriptor, lanes of bounded memory,
and the order of upload, encoding and writing. A CPU takes the same path without streams."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_stubs import (
    EMPTY,
    LiveBytes,
    Recorder,
    embed,
    empty_pages,
    encoding_of,
    latent_of,
    paged_map,
)
from torch import Tensor

from awareness_vllm.align.encoding import LatentEncoding
from awareness_vllm.align.footprint import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    FLOAT,
    ROW_STEP,
    UPLOAD_BYTES,
    Footprint,
    chunk_rows,
    device_bytes,
    staged_row_bytes,
)
from awareness_vllm.align.paged import PagedMap, scale_table
from awareness_vllm.align.workspace import (
    LANES,
    PADDING,
    WRITES,
    DeviceWorkspace,
    Staging,
)
from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.kernels import ops
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import WMatrixManifest

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox, naïve dogs"
HEADS = {i: slice(0, 1) for i in range(3)}


@pytest.fixture(scope="module")
def package(make_package: Callable[..., Package]) -> Package:
    return make_package(TEXT)


def random_encoding(
    paged: PagedMap, source: Tensor, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> LatentEncoding:
    """An encoding of a memory of random states, whose rows read these source tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = paged.manifest.source.layers
    tokens = int(source.max()) + 1
    keys, values = (
        [torch.randn(tokens, g.heads, g.head_dim, generator=generator).to(dtype) for g in layers]
        for _ in range(2)
    )
    ids = torch.randint(1000, (len(paged.manifest.sink) + len(source),), generator=generator)
    return LatentEncoding(paged, keys, values, ids.tolist(), source, embed)


def finished(encoding: LatentEncoding) -> Tensor:
    while not encoding.step():
        wait(encoding.awaited)
    return encoding.memory.rows


# One table for each descriptor


def test_layers_and_maps_share_one_table_for_each_descriptor(wmatrix: WMatrix) -> None:
    workspace = DeviceWorkspace("cpu", 64)
    manifest = wmatrix.manifest
    first = manifest.target.layers[0]
    target = manifest.target.model_copy(update={"layers": (first, first, first)})
    same = replace(wmatrix, manifest=manifest.model_copy(update={"target": target}))
    one, other = (paged_map(map_, workspace=workspace) for map_ in (wmatrix, same))
    (cos, sin), (other_cos, other_sin) = one.cos_sin, other.cos_sin
    assert {id(table) for table in (*other_cos, cos[0])} == {id(cos[0])}
    assert {id(table) for table in (*other_sin, sin[0])} == {id(sin[0])}
    assert len(workspace.rotations.tables) == 3


def test_no_table_is_made_for_a_load(
    wmatrix: WMatrix, package: Package, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the target's positions, nor, beyond the chunk's own rows, of the source's."""
    paged = paged_map(wmatrix, chunk_rows=7)
    latent_of(paged, package, folder, embed)
    tables = dict(paged.workspace.rotations.tables)
    from awareness_vllm.models import rope

    monkeypatch.setattr(rope, "SCHEMES", {})
    monkeypatch.setattr(rope, "cos_sin", lambda *args: pytest.fail("angles were computed"))
    latent = latent_of(paged, package, folder, embed)
    slots = torch.arange(len(latent.ids))
    paged.write(latent, empty_pages(3, 16), [slots] * 3, begin=0)
    assert paged.workspace.rotations.tables == tables


# Memory


def test_a_maps_footprint_is_what_it_allocates(wmatrix: WMatrix) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        map_ = replace(wmatrix, encode=wmatrix.encode.to(dtype), decode=wmatrix.decode.to(dtype))
        paged = paged_map(map_, chunk_rows(map_.manifest))
        own = [paged.mean, paged.scale, paged.encode, paged.reach, paged.decode, paged.bias]
        own += [states for part in paged.sinks for states in part]
        size = Footprint.of(map_.manifest, HEADS, dtype.itemsize)
        assert size.tensors == sum(tensor.nbytes for tensor in own)
        workspace = paged.workspace
        assert [lane.bytes for lane in workspace.lanes] == [size.chunk] * LANES
        assert [staging.bytes for staging in workspace.writes] == [size.write] * WRITES
        tables = sum(t.nbytes for pair in workspace.rotations.tables.values() for t in pair)
        total = device_bytes([(map_.manifest, dtype.itemsize)], HEADS, 64)
        lanes = LANES * (size.chunk + size.encoding)
        writes = WRITES * max(size.write, UPLOAD_BYTES) + size.writing
        assert total == size.tensors + tables + lanes + writes
        assert tables == 2 * FLOAT * 64 * (2 + 2 + 0)


def test_maps_of_one_target_share_tables_and_lanes(wmatrix: WMatrix) -> None:
    one = (wmatrix.manifest, 4)
    size = Footprint.of(*one[:1], HEADS, 4)
    assert device_bytes([], HEADS, 64) == WRITES * UPLOAD_BYTES
    assert device_bytes([one] * 3, HEADS, 64) == device_bytes([one], HEADS, 64) + 2 * size.tensors


def shapes(manifest: WMatrixManifest, layers: int, hidden: int) -> WMatrixManifest:
    """A map between two models of so many layers, 8 KV heads of 128 dims and 128k positions."""
    rope = Positions(scheme="rope", theta=5e5, rotary_dim=128)
    layer = LayerGeometry(heads=8, head_dim=128, positions=rope)
    update = {"layers": (layer,) * layers, "hidden_size": hidden, "dtype": "bfloat16"}
    source, target = (side.model_copy(update=update) for side in (manifest.source, manifest.target))
    read = tuple(range(0, layers, 2))
    sides = {"source": source, "target": target, "layers": read, "rank": 4096}
    return manifest.model_copy(update=sides)


@pytest.mark.parametrize(
    ("layers", "hidden", "rows", "gib"), [(32, 4096, 2048, 2.1), (80, 8192, 1280, 3.6)]
)
def test_the_shapes_of_an_8b_and_a_70b_take_bounded_memory(
    wmatrix: WMatrix, layers: int, hidden: int, rows: int, gib: float
) -> None:
    """As docs/design.md states; tables for each layer alone were 2 and 5 GiB."""
    manifest = shapes(wmatrix.manifest, layers, hidden)
    heads = {i: slice(None) for i in range(layers)}
    assert chunk_rows(manifest) == rows
    assert rows == CHUNK_ROWS or rows * staged_row_bytes(manifest) <= CHUNK_BYTES
    assert rows % ROW_STEP == 0
    assert device_bytes([(manifest, 2)], heads, 131072) / 2**30 == pytest.approx(gib, abs=0.05)


def most_bytes(paged: PagedMap, rows: int) -> int:
    """The most bytes that were allocated at once to encode a memory of so many rows, chunk by
    chunk."""
    encoding = random_encoding(paged, torch.arange(rows))
    lane = paged.workspace.lanes[0]
    before = [*encoding.keys, *encoding.values, encoding.source, encoding.memory.rows]
    with LiveBytes([*before, lane.host, lane.device]) as counted:
        for begin in range(0, rows, encoding.chunk_rows):
            encoding.encode_chunk(begin, min(begin + encoding.chunk_rows, rows), lane)
    return counted.most


def test_a_long_memory_takes_no_more_than_a_short_one(wmatrix: WMatrix) -> None:
    paged = paged_map(wmatrix, chunk_rows=128, workspace=DeviceWorkspace("cpu", 4096))
    lanes = [lane.device.data_ptr() for lane in paged.workspace.lanes]
    short = most_bytes(paged, 128)
    assert most_bytes(paged, 1024) <= short + 16 * PADDING
    # In one piece it takes more, by the other rows' embeddings and latents at least; what operators
    # need inside is bounded by themselves.
    whole = most_bytes(paged_map(wmatrix, chunk_rows=1024), 1024)
    row = wmatrix.manifest.target.hidden_size + wmatrix.manifest.rank
    assert whole - short > (1024 - 128) * FLOAT * row
    assert [lane.device.data_ptr() for lane in paged.workspace.lanes] == lanes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", [1, 4])
def test_a_memory_that_is_wider_or_denser_takes_no_more(
    wmatrix: WMatrix, stride: int, dtype: torch.dtype
) -> None:
    """By more source tokens than a chunk has rows, or by a wider dtype than the map's source."""
    rows = chunk_rows(wmatrix.manifest)
    paged = paged_map(wmatrix, rows)
    sizes = [lane.bytes for lane in paged.workspace.lanes]
    states = finished(random_encoding(paged, torch.arange(0, stride * rows, stride), dtype=dtype))
    assert states.isfinite().all()
    assert [lane.bytes for lane in paged.workspace.lanes] == sizes


# Chunks


@settings(max_examples=40, deadline=None)
@given(
    source=st.lists(st.integers(0, 60), min_size=1, max_size=50),
    rows=st.integers(1, 60),
    ordered=st.booleans(),
)
def test_chunks_give_the_latent_of_the_whole_memory(
    wmatrix: WMatrix, source: list[int], rows: int, ordered: bool
) -> None:
    """In order or not, denser than the chunk's rows or not; row 0 is the source's sink. A row reads
    more predecessors than the target's sink has tokens."""
    read = torch.tensor(sorted(source) if ordered else source)
    workspace = DeviceWorkspace("cpu", 64)
    sinks = [[states[:1] for states in p] for p in (wmatrix.sink_keys, wmatrix.sink_values)]
    manifest = wmatrix.manifest.model_copy(update={"sink": (2,)})
    map_ = replace(wmatrix, manifest=manifest, sink_keys=sinks[0], sink_values=sinks[1])
    whole = random_encoding(paged_map(map_, 10**6, workspace), read)
    chunked = random_encoding(paged_map(map_, rows, workspace), read)
    torch.testing.assert_close(finished(chunked), finished(whole), rtol=1e-5, atol=1e-4)


def test_a_map_that_reads_no_tokens_looks_none_up(wmatrix: WMatrix, folder: Path) -> None:
    manifest = wmatrix.manifest.model_copy(update={"predecessors": None})
    width = manifest.source_width
    paged = paged_map(
        replace(
            wmatrix,
            manifest=manifest,
            mean=wmatrix.mean[:width],
            scale=wmatrix.scale[:width],
            encode=wmatrix.encode[:width],
        ),
        chunk_rows=5,
    )
    encoding = random_encoding(paged, torch.arange(1, 12))
    encoding.embed = lambda ids: pytest.fail("an embedding was looked up")
    whole = random_encoding(paged, torch.arange(1, 12))
    whole.encode_chunk(0, 11, paged.workspace.lanes[0])
    torch.testing.assert_close(finished(encoding), whole.memory.rows, rtol=1e-5, atol=1e-5)


def test_a_step_begins_one_chunk_and_never_waits(wmatrix: WMatrix) -> None:
    paged = paged_map(wmatrix, chunk_rows=2)
    encoding, other = (random_encoding(paged, torch.arange(10), seed) for seed in (0, 1))
    lanes = [paged.workspace.free.get() for _ in range(LANES)]
    assert not encoding.step()  # all lanes are busy
    assert (encoding.begin, list(encoding.awaited)) == (0, [])
    for lane in lanes:
        paged.workspace.free.put(lane)
    for begun in range(1, 6):
        encoding.step()
        assert encoding.begin == 2 * begun
        wait(encoding.awaited)
    assert encoding.step()
    assert torch.equal(encoding.memory.rows, finished(random_encoding(paged, torch.arange(10))))
    assert not torch.equal(encoding.memory.rows, finished(other))


def test_a_chunk_that_fails_gives_its_lane_back(wmatrix: WMatrix) -> None:
    paged = paged_map(wmatrix, chunk_rows=4)
    poisoned = random_encoding(paged, torch.arange(12))
    poisoned.values[1][6] = float("nan")
    states = poisoned.keys, poisoned.values
    for _ in range(LANES + 1):
        with pytest.raises(PackageCorrupt):
            finished(LatentEncoding(paged, *states, poisoned.memory.ids, poisoned.source, embed))
    assert finished(random_encoding(paged, torch.arange(12))).isfinite().all()


def test_scales_of_heads_stand_head_by_head() -> None:
    states = [torch.empty(2, 4, heads, 4) for heads in (2, 3)]
    layers: list[tuple[float | tuple[float, ...], Tensor]] = [(0.5, states[0]), (2.0, states[1])]
    assert scale_table(layers).tolist() == [0.5, 2.0]
    layers[1] = ((1.0, 2.0, 4.0), states[1])
    assert scale_table(layers).tolist() == [0.5, 0.5, 1.0, 2.0, 4.0]


# Order, on a device with streams: a recorder, since a CPU has none


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of uploads and operators, in order."""
    log: list[str] = []
    for owner, name in (
        (Staging, "upload"),
        (ops, "encode_states"),
        (ops, "decode_paged"),
    ):
        real = getattr(owner, name)

        def noted(*args: Any, name: str = name, real: Any = real) -> Any:
            result = real(*args)
            log.append(name)
            return result

        monkeypatch.setattr(owner, name, noted)
    return log


def test_a_chunk_is_uploaded_encoded_and_read_back_on_one_stream(
    wmatrix: WMatrix, package: Package, folder: Path, log: list[str]
) -> None:
    paged = paged_map(wmatrix)
    lane = paged.workspace.lanes[0]
    lane.stream = Recorder(log)
    encoding = encoding_of(paged, package, folder, embed)

    def looked_up(ids: Tensor) -> Tensor:
        assert lane.stream.inside  # type: ignore[attr-defined]
        log.append("embed")
        return embed(ids)

    encoding.embed = looked_up
    encoding.encode_chunk(0, len(encoding.source), lane)
    assert log == ["embed", "mark upload 1", "upload", "encode_states"]


def test_a_write_waits_for_its_upload_and_the_next_upload_for_that_write(
    wmatrix: WMatrix, package: Package, folder: Path, log: list[str]
) -> None:
    """Two buffers in turn: the third chunk's upload must not overtake the first one's write."""
    paged = paged_map(wmatrix)
    latent = latent_of(paged, package, folder, embed)
    paged.chunk_rows = -(-len(latent.ids) // 3)
    recorder = Recorder(log)
    for staging in paged.workspace.writes:
        staging.stream = recorder
    log.clear()
    slots = torch.arange(len(latent.ids))
    pages = empty_pages(3, 16)
    paged.write(latent, pages, [slots] * 3, begin=0)
    assert not (pages[0].keys.flatten(0, 1)[slots] == EMPTY).any()
    chunk = "mark upload {0};upload;engine waits for upload {0};decode_paged;mark use {1}"
    expected = [*chunk.format(1, 2).split(";"), *chunk.format(3, 4).split(";")]
    expected += ["host waits for upload 1", "stream waits for use 2"]
    assert log == [*expected, *chunk.format(5, 6).split(";")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_gives_what_a_cpu_gives(
    wmatrix: WMatrix, package: Package, folder: Path, geometry: Geometry
) -> None:
    """The lanes' streams, pinned buffers and events, on the device itself."""
    results = []
    for device in ("cpu", "cuda"):
        paged = paged_map(wmatrix, 7, DeviceWorkspace(device, 64))
        latent = latent_of(paged, package, folder, lambda ids, to=device: embed(ids).to(to))
        pages = empty_pages(3, 16)
        pages = [replace(p, keys=p.keys.to(device), values=p.values.to(device)) for p in pages]
        slots = torch.arange(len(latent.ids))
        paged.write(latent, pages, [slots] * 3, begin=0)
        results.append([p.cpu() for page in pages for p in (page.keys, page.values)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
