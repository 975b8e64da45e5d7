"""Latent packages: the same states as their packages', for the target of one map only."""

from __future__ import annotations

import json
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_pairs import RANK, TEXT, Pair, no_embedding
from loader_stubs import loader_of, part
from paged_stubs import paged_map
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.align.encoding import LatentCopy
from awareness_vllm.align.paged import Latent
from awareness_vllm.align.realign import (
    BLOCK,
    AlignedMemory,
    Realignment,
    latent_rows,
    sources,
)
from awareness_vllm.aligners.aligner import KVCacheAligner
from awareness_vllm.aligners.answer import OfflineTarget
from awareness_vllm.errors import (
    PackageCorrupt,
    UnsupportedRequest,
)
from awareness_vllm.packages.file import (
    publish,
    read,
    read_index,
    with_payload,
)
from awareness_vllm.packages.manifest import METADATA_KEY, read_manifest
from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.connector.canary import Canary
from awareness_vllm.serving.connector.capture_queue import CaptureQueue
from awareness_vllm.serving.request import MemoryRequest

pytestmark = pytest.mark.unit


def states(memory: AlignedMemory) -> Tensor:
    return torch.cat([state.float().flatten(1) for state in (*memory.keys, *memory.values)], dim=1)


def rewrite(
    path: Path,
    out: Path,
    manifest: dict[str, Any] | None = None,
    latent: dict[str, Any] | None = None,
    **tensors: Tensor | None,
) -> Path:
    """A copy of a latent package with other fields or tensors, a well-formed file still."""
    with safe_open(path, framework="pt") as file:
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[METADATA_KEY])
    document = document | {"latent": document["latent"] | (latent or {})} | (manifest or {})
    if "rows" in tensors:  # `latent` are the manifest's fields
        tensors["latent"] = tensors.pop("rows")
    kept = {name: t for name, t in (own | tensors).items() if t is not None}
    save_file(kept, out, {METADATA_KEY: json.dumps(document)})
    return out


# What a latent is worth


def test_a_latent_gives_the_states_of_its_package_bit_for_bit(pair: Pair) -> None:
    latent, plain = pair.latent(), pair.realign(pair.package)
    assert latent.rows().shape == (len(latent.tokens), RANK)
    assert len(latent.tokens) > BLOCK
    memory = pair.realign(latent)
    assert memory.ids == plain.ids
    assert torch.equal(states(memory), states(plain))


def test_int8_loses_less_than_half_a_level_of_each_dim(pair: Pair) -> None:
    exact, rounded = pair.latent().rows().float(), pair.latent("int8")
    assert rounded.stored["latent"].dtype == torch.int8
    off, level = (exact - rounded.rows()).abs(), exact.abs().amax(0) / 127
    assert bool((off <= (0.5 + 2**-10) * level).all())
    assert float(off.max()) > 0
    assert len(pair.realign(rounded).ids) == len(pair.realign(pair.latent()).ids)
    sizes = [pair.path(name).stat().st_size for name in ("int8", "latent", "plain")]
    assert sizes == sorted(sizes)


def test_a_package_without_its_states_is_refused_where_they_are_needed(pair: Pair) -> None:
    path = pair.path("latent")
    with pytest.raises(UnsupportedRequest, match=pair.ids["plain"]):
        read(path)
    index = read_index(path, digest=digest_in(path.stem))
    assert (index.text, index.manifest) == (TEXT, read_manifest(path))
    assert len(index.tokens) == index.manifest.rows != index.manifest.tokens
    assert index.manifest.name == "many words"


# Strangers' files


def test_a_file_that_contradicts_its_manifest_is_refused(pair: Pair, tmp_path: Path) -> None:
    path, out = pair.path("latent"), tmp_path / "p"
    manifest = read_manifest(path)
    count, layers = manifest.rows, len(manifest.geometry.layers)
    contradictions: list[dict[str, Any]] = [
        {"manifest": {"format": "awareness-memory/1"}},
        {"manifest": {"latent": None}},
        {"manifest": {"latent": {"rank": RANK}}},
        {"manifest": {"has_text": False}},
        {"manifest": {"first_tokens": [1] * layers}},
        {"latent": {"rank": RANK + 1}},
        {"latent": {"tokens": count - 1}},
        {"latent": {"dtype": "int8"}},
        {"latent": {"dtype": "float64"}},
        {"latent": {"wmatrix": "x"}},
        {"latent": {"package": "../" * 12}},
        {"extra": torch.zeros(1)},
        {"latent_scale": torch.ones(RANK)},
        {"spans": None},
    ]
    for changes in contradictions:
        with pytest.raises(PackageCorrupt):
            read_manifest(rewrite(path, out, **changes))
    not_finite = pair.latent().rows().clone()
    not_finite[3, 2] = torch.inf
    for name, tensor in {
        "tokens": torch.full((count,), manifest.reader.vocab_size, dtype=torch.int32),
        "spans": torch.full((count, 2), 1 << 40),
        "rows": not_finite,
    }.items():
        with pytest.raises(PackageCorrupt, match=r"ids below|spans within|finite"):
            read_index(rewrite(path, out, **{name: tensor}))


def test_states_that_no_model_has_never_come_of_a_latent(pair: Pair) -> None:
    latent, int8 = pair.latent(), pair.latent("int8")
    far = {"latent": torch.full_like(latent.rows(), 3e38)}
    scaled = int8.stored | {"latent_scale": torch.full((RANK,), 3e38)}
    for package, stored in ((latent, far), (int8, scaled)):
        with pytest.raises(PackageCorrupt, match="memory's states are"):
            pair.realign(replace(package, stored=stored))
    # Finite in the file, and not in the map's dtype.
    half = replace(pair.map, encode=pair.map.encode.half() * 1e4, decode=pair.map.decode.half())
    with pytest.raises(PackageCorrupt, match="memory's states are"):
        latent_rows(replace(latent, stored={"latent": torch.full((1, RANK), 7e4)}), half, slice(1))
    # Within the reach of features, and still no state: `check_states` has the last word.
    with pytest.raises(PackageCorrupt, match="aligned states"):
        pair.realign(latent, replace(pair.map, decode=pair.map.decode * 1e4))


def test_rows_of_another_text_are_refused(pair: Pair, tmp_path: Path) -> None:
    latent = pair.latent()
    others = {"tokens": latent.tokens[::-1]}, {"spans": np.roll(latent.spans, 1, axis=0)}
    for other in (replace(latent, **changes) for changes in others):
        with pytest.raises(PackageCorrupt, match="not those of its text"):
            pair.realign(other)
    memory = publish(with_payload(replace(latent, tokens=latent.tokens[::-1])), tmp_path).stem
    with pytest.raises(PackageCorrupt, match="not those of its text"):
        pair.resolver(tmp_path).resolve_one(memory, "")


# Where it is used


@pytest.mark.parametrize("on_device", [False, True])
def test_it_is_checked_and_loaded_a_block_at_a_time(pair: Pair, on_device: bool) -> None:
    """Other requests wait for a step of a load, and a latent may be long."""
    latent = pair.latent()
    rows = latent.rows().clone()
    rows[-1] = 3e38
    package = replace(latent, stored={"latent": rows})
    ids, source = sources(package, pair.map.manifest, pair.target)
    work: LatentCopy | Realignment = LatentCopy(package, pair.map, ids)
    if not on_device:
        work = Realignment(package, pair.map, ids, source, no_embedding, dtype=torch.bfloat16)
    assert len(rows) > BLOCK
    assert not work.step()
    assert work.begin == BLOCK
    with pytest.raises(PackageCorrupt):
        work.step()


def test_a_server_resolves_it_as_its_package(pair: Pair) -> None:
    resolver = pair.resolver(pair.store)
    plain, latent = (
        resolver.resolve(MemoryRequest(ids=(pair.ids[name],)), "") for name in ("plain", "latent")
    )
    assert (plain.ids, plain.tail) == (latent.ids, latent.tail)
    one, other = plain.memories[0], latent.memories[0]
    assert one.text is not None  # passages can be quoted and re-read
    assert (one.wmatrix, one.origin, one.text[0]) == (other.wmatrix, other.origin, other.text[0])
    assert one.digest != other.digest


@pytest.mark.parametrize("on_device", [False, True])
def test_a_worker_loads_it_without_the_models_embedding(pair: Pair, on_device: bool) -> None:
    loader = loader_of(pair.target, pair.map.manifest.target, pair.store)
    loader.wmatrices["map"] = pair.map
    if on_device:
        loader.paged["map"] = paged_map(pair.map)
    wanted = part(pair.ids["latent"])
    alignment = loader.request(wanted, "")
    wait([alignment.source], 30)
    while not alignment.result.done():
        loader.advance()
    memory, temperature = alignment.result.result()
    plain = pair.realign(pair.package)
    assert (temperature, memory.ids) == ("cold", plain.ids)
    if on_device:
        assert isinstance(memory, Latent)
        assert torch.equal(memory.rows, pair.latent().rows())
    else:
        assert torch.equal(states(memory), states(plain))
    # A stranger's is compared with what the target computes itself, on a device, too.
    keys = Canary(loader, CaptureQueue()).first_keys(wanted, alignment.source.result(), 9)
    assert all(torch.equal(key, whole[:9]) for key, whole in zip(keys, plain.keys, strict=True))
    assert loader.request(wanted, "").result.result()[1] == "warm"


def test_the_published_names_take_it(pair: Pair) -> None:
    wmatrix = pair.store / "pair.wmatrix"
    aligner = KVCacheAligner(pair.source, pair.target, wmatrix=wmatrix, store=pair.store)
    plain, latent = (aligner.align(pair.ids[name]) for name in ("plain", "int8"))
    assert plain.ids == latent.ids
    aligner.configure(head_mapping="uniform")
    with pytest.raises(UnsupportedRequest, match="latent package"):
        aligner.align(pair.ids["latent"])
    target = OfflineTarget(pair.target, [wmatrix])
    answer = target.use(pair.latent()).ask("which fox jumps?", max_tokens=3)
    assert answer.memory_tokens == len(plain.ids)
