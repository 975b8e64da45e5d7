"""Latent packages: the same states as their packages', for the target of one map only."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from loader_stubs import loader_of, part
from paged_stubs import paged_map
from random_maps import random_map
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.align.latent import check_exportable, to_latent
from awareness_vllm.align.paged import Latent
from awareness_vllm.align.realign import BLOCK, AlignedMemory, realign
from awareness_vllm.aligners.aligner import KVCacheAligner
from awareness_vllm.aligners.answer import OfflineTarget
from awareness_vllm.cli.main import main
from awareness_vllm.compatibility.load_time.cost import decoding, load_times_s
from awareness_vllm.compatibility.load_time.speed import REFERENCE
from awareness_vllm.compatibility.memory_checker import MemoryCompatibilityChecker
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import (
    AwarenessError,
    NoWMatrix,
    PackageCorrupt,
    UnsupportedModel,
    UnsupportedRequest,
)
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import (
    AnyPackage,
    Package,
    publish,
    read,
    read_index,
    verify,
    with_payload,
    without_text,
)
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.manifest import METADATA_KEY, read_manifest
from awareness_vllm.packages.origin import is_own
from awareness_vllm.packages.store import Store, digest_in
from awareness_vllm.serving.connector.canary import Canary
from awareness_vllm.serving.connector.capture_queue import CaptureQueue
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry

pytestmark = pytest.mark.unit

TEXT = " ".join(["The quick brown fox jumps over the lazy dog, and others look on."] * 70)
"""More than one block of the target's tokens."""
RANK = 6


Embed = Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """A map between two tiny models, a package of the source, and a `store` with the package, its
    latents as they are and in int8, and the map."""

    source: Path
    target: Path
    map: WMatrix
    embed: Embed
    package: Package
    store: Path
    ids: dict[str, str]

    def path(self, name: str) -> Path:
        return self.store / f"{self.ids[name]}.safetensors"

    def latent(self, name: str = "latent") -> LatentPackage:
        latent = verify(self.path(name))
        assert isinstance(latent, LatentPackage)
        return latent

    def realign(self, package: AnyPackage, wmatrix: WMatrix | None = None) -> AlignedMemory:
        """As a server does, but for what is in a latent already."""
        embed = self.embed if isinstance(package, Package) else no_embedding
        dtype = torch.bfloat16
        return realign(package, wmatrix or self.map, self.target, embed, dtype=dtype)

    def resolver(self, store: Path) -> MemoryResolver:
        registry = Registry.read([self.store / "pair.wmatrix"])
        return MemoryResolver(ServedModel.read(self.target, 2000), {"": Store(store)}, registry, 5)


def no_embedding(ids: Tensor) -> Tensor:
    raise AssertionError("the target's embeddings are in the latent already")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_models: tuple[Path, Path]) -> Pair:
    source, target = tiny_models
    store = tmp_path_factory.mktemp("store")
    random = random_map(geometry_of(source), geometry_of(target), RANK)
    # As `fit` has them.
    products = random.encode.bfloat16(), random.decode.bfloat16()
    wmatrix = replace(random, encode=products[0], decode=products[1])
    wmatrix.save(store / "pair.wmatrix")
    embedding = load_model(target, torch.bfloat16).get_input_embeddings()

    def embed(ids: Tensor) -> Tensor:
        return embedding(ids).float()

    package = capture(source, TEXT, name="many words")
    ids = {"plain": publish(package, store).stem}
    for name, int8 in (("latent", False), ("int8", True)):
        latent = to_latent(package, wmatrix, target, embed, package_id=ids["plain"], int8=int8)
        ids[name] = publish(latent, store).stem
    return Pair(source, target, wmatrix, embed, package, store, ids)


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
    assert latent.rows.shape == (len(latent.tokens), RANK)
    assert len(latent.tokens) > BLOCK
    memory = pair.realign(latent)
    assert memory.ids == plain.ids
    assert torch.equal(states(memory), states(plain))


def test_int8_loses_less_than_half_a_level_of_each_dim(pair: Pair) -> None:
    exact, rounded = pair.latent().rows.float(), pair.latent("int8")
    assert rounded.stored["latent"].dtype == torch.int8
    off, level = (exact - rounded.rows).abs(), exact.abs().amax(0) / 127
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


# Which map


def test_its_map_is_found_whatever_certificate_and_name_it_has(pair: Pair, tmp_path: Path) -> None:
    manifest = read_manifest(pair.path("latent"))
    assert manifest.latent is not None
    source, target = manifest.geometry, manifest.latent.target
    replace(pair.map, bias=pair.map.bias + 1).save(tmp_path / "a.wmatrix")
    measured = pair.map.manifest.model_copy(update={"r2": {}})
    replace(pair.map, manifest=measured).save(tmp_path / "b.wmatrix")
    registry = Registry.read([tmp_path])
    entry = registry.find_for(manifest, target)
    assert (entry.path.name, entry.tensors) == ("b.wmatrix", pair.map.tensors_digest)
    assert registry.find(source, target, has_text=True).path.name == "a.wmatrix"
    with pytest.raises(NoWMatrix, match=f"{entry.tensors[:12]}.*{pair.ids['plain']}"):
        Registry.read([tmp_path / "a.wmatrix"]).find_for(manifest, target)
    residual = entry.manifest.model_copy(update={"residual": True})
    with pytest.raises(NoWMatrix):
        Registry((replace(entry, manifest=residual),)).find_for(manifest, target)


def test_a_latent_is_for_its_target_alone(pair: Pair) -> None:
    checker = MemoryCompatibilityChecker([pair.store / "pair.wmatrix"], store=pair.store)
    plain, latent, int8 = (checker.check(id, str(pair.target)) for id in pair.ids.values())
    assert plain.refusal is latent.refusal is None
    size, manifest = pair.path("latent").stat().st_size, pair.map.manifest
    work = decoding(manifest)  # nothing is encoded any more
    tokens, config = read_manifest(pair.path("latent")).tokens, TargetConfig()
    served = manifest.target, tokens, config, REFERENCE
    times = load_times_s(*served, package_bytes=size, wmatrix=work)
    assert latent.estimated_load_time_s == pytest.approx(times["cold"])
    assert {risk.description for risk in int8.risk_factors} > {
        risk.description for risk in latent.risk_factors
    }
    # Not even its source's, which would copy the package itself.
    assert "made for" in str(checker.check(pair.ids["latent"], str(pair.source)).refusal)


def test_exports_that_cannot_be_are_refused(pair: Pair) -> None:
    def refused(
        kind: type[AwarenessError],
        match: str,
        package: AnyPackage = pair.package,
        target: Path = pair.target,
        **changes: Any,
    ) -> None:
        wmatrix = replace(pair.map, manifest=pair.map.manifest.model_copy(update=changes))
        with pytest.raises(kind, match=match):
            to_latent(package, wmatrix, target, pair.embed, package_id=pair.ids["plain"])

    # A map that leads to the package's own model.
    with pytest.raises(UnsupportedRequest, match="exactly"):
        check_exportable(pair.package, reversed_map(pair))
    refused(UnsupportedModel, "another model", source=pair.map.manifest.target)
    refused(UnsupportedRequest, "residual", residual=True)
    refused(UnsupportedRequest, "has its text", predecessors=None)
    refused(UnsupportedRequest, "has its text", without_text(pair.package))
    refused(UnsupportedRequest, "latent package", pair.latent())
    refused(UnsupportedModel, "the map's target", target=pair.source)


def reversed_map(pair: Pair) -> WMatrix:
    manifest = pair.map.manifest
    update = {"source": manifest.target, "target": manifest.source}
    return replace(pair.map, manifest=manifest.model_copy(update=update))


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
    not_finite = pair.latent().rows.clone()
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
    far = {"latent": torch.full_like(latent.rows, 3e38)}
    scaled = int8.stored | {"latent_scale": torch.full((RANK,), 3e38)}
    for package, stored in ((latent, far), (int8, scaled)):
        with pytest.raises(PackageCorrupt, match="memory's states are"):
            pair.realign(replace(package, stored=stored))
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
        assert torch.equal(memory.rows, pair.latent().rows)
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


def test_export_writes_it_beside_its_package(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def document(*argv: str, status: int = 0) -> dict[str, Any]:
        assert main([*argv, "--json"]) == status
        result: dict[str, Any] = json.loads(capfd.readouterr().out)
        return result

    plain, wmatrix = publish(pair.package, tmp_path), str(pair.store / "pair.wmatrix")
    export = ["--store", str(tmp_path), "--target", str(pair.target), "--latent", wmatrix]
    made = document("export", plain.stem, *export)
    # The same bytes as from Python.
    assert (made["id"], made["of"]) == (pair.ids["latent"], plain.stem)
    assert made["bytes"] == Path(made["path"]).stat().st_size < made["bytes_before"]
    assert is_own(read_index(Path(made["path"])).digest)
    assert document("verify", made["path"])["id"] == made["id"]
    assert document("inspect", made["path"])["latent"]["package"] == plain.stem
    (row,) = (r for r in document("list", "--store", str(tmp_path))["memories"] if r["latent_of"])
    assert (row["id"], row["latent_of"]) == (made["id"], plain.stem)
    again = document("export", made["path"], *export, status=1)
    assert again["error"]["type"] == "UnsupportedRequest"
    small = document("export", plain.stem, *export, "--int8", "--out", str(tmp_path / "other"))
    assert small["bytes"] < made["bytes"]


def test_what_a_stranger_captured_does_not_become_ours_by_an_export(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = replace(pair.package, keys=[key * 0.5 for key in pair.package.keys])
    plain = publish(with_payload(other), tmp_path, sealed=False)
    export = ["export", str(plain), "--latent", str(pair.store / "pair.wmatrix")]
    assert main([*export, "--target", str(pair.target), "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert not is_own(read_index(Path(made["path"])).digest)
