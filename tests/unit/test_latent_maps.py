"""Which map a latent package is for, and how it is exported, listed and found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latent_pairs import RANK, Pair
from memories_server import CHECK, LOAD, certificate_with, server_of_tenants

from awareness_vllm.align.latent import check_exportable, to_latent
from awareness_vllm.aligners.aligner import KVCacheAligner
from awareness_vllm.aligners.multihop import MultiHopRouter
from awareness_vllm.cli.main import main
from awareness_vllm.compatibility.advice import advice
from awareness_vllm.compatibility.context import CheckContext, memory_info, model
from awareness_vllm.compatibility.load_time.cost import decoding, load_times_s
from awareness_vllm.compatibility.load_time.speed import REFERENCE
from awareness_vllm.compatibility.memory_checker import MemoryCompatibilityChecker
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import (
    AwarenessError,
    NoWMatrix,
    UnsupportedModel,
    UnsupportedRequest,
)
from awareness_vllm.marketplace.files import push_file
from awareness_vllm.marketplace.maps import RepositoryMaps
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.file import (
    AnyPackage,
    publish,
    read_index,
    with_payload,
    without_text,
)
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.origin import is_own
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry

pytestmark = pytest.mark.unit


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
    # One that a registry lists is asked the same.
    layout = open_repository(tmp_path / "layout")
    for name in ("a", "b"):
        push_file(tmp_path / f"{name}.wmatrix", layout)
    maps = Registry(more=RepositoryMaps(layout))
    assert maps.find_for(manifest, target).tensors == entry.tensors
    other = manifest.latent.model_copy(update={"rank": RANK + 1})
    for registry in (Registry((entry,)), maps):
        with pytest.raises(NoWMatrix):
            registry.find_for(manifest.model_copy(update={"latent": other}), target)
    textless = entry.manifest.model_copy(update={"predecessors": None})
    assert not replace(entry, manifest=textless).made(manifest.latent)


def test_a_latent_is_for_its_target_alone(pair: Pair) -> None:
    checker = MemoryCompatibilityChecker([pair.store / "pair.wmatrix"], store=pair.store)
    plain, latent, int8 = (checker.check(id, str(pair.target)) for id in pair.ids.values())
    assert plain.refusal is latent.refusal is None
    size, manifest = pair.path("latent").stat().st_size, pair.map.manifest
    work = decoding(manifest)  # nothing is encoded any more
    tokens, config = read_manifest(pair.path("latent")).rows, TargetConfig()
    served = manifest.target, tokens, config, REFERENCE
    times = load_times_s(*served, package_bytes=size, wmatrix=work)
    assert latent.estimated_load_time_s == pytest.approx(times["cold"])
    assert {risk.description for risk in int8.risk_factors} > {
        risk.description for risk in latent.risk_factors
    }
    assert (latent.tokens, plain.tokens) == (tokens, pair.package.manifest.tokens)
    # Not even its source's, which would copy the package itself.
    refused = checker.check(pair.ids["latent"], str(pair.source))
    assert "made for" in str(refused.refusal)
    assert pair.ids["plain"] in str(refused.actions)
    assert "fit" not in str(refused.actions)


def test_no_other_map_moves_a_latent(pair: Pair) -> None:
    registry = Registry.read([pair.store / "pair.wmatrix"])
    for name, moved in (("plain", True), ("latent", False)):
        info, target = memory_info(pair.ids[name], pair.store, registry), str(pair.target)
        check = CheckContext(info, model(target, registry), TargetConfig(), registry, info.tokens)
        assert ("a higher rank" in str(advice(check, 0.5))) == moved
    router = MultiHopRouter([pair.store / "pair.wmatrix"], store=pair.store)
    ends = pair.source, pair.target
    assert router.find_optimal_path(*ends, pair.ids["plain"], uncertified=True).wmatrices
    with pytest.raises(UnsupportedRequest, match=pair.ids["plain"]):
        router.find_optimal_path(*ends, pair.ids["latent"], uncertified=True)


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
    wrong = document("export", plain.stem, *export, "--name", "x", status=1)
    assert wrong["error"]["type"] == "BadInput"
    hub = "export", made["path"], "--hf", str(tmp_path / "hub")
    assert document(*hub, "--int8", status=1)["error"]["type"] == "BadInput"
    assert document("push", made["path"], str(tmp_path / "layout"))["pushed"]
    (row,) = document("search", "--registry", str(tmp_path / "layout"))["listings"]
    assert (row["latent_of"], row["target"]) == (plain.stem, pair.map.manifest.target.name)


def test_what_a_stranger_captured_does_not_become_ours_by_an_export(
    pair: Pair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = replace(pair.package, keys=[key * 0.5 for key in pair.package.keys])
    plain = publish(with_payload(other), tmp_path, sealed=False)
    export = ["export", str(plain), "--latent", str(pair.store / "pair.wmatrix")]
    assert main([*export, "--target", str(pair.target), "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert not is_own(read_index(Path(made["path"])).digest)


def test_a_server_says_what_it_can_do_with_it(pair: Pair, tmp_path: Path) -> None:
    """With the map that made it, with another one of the same models, and on the source."""
    replace(pair.map, bias=pair.map.bias + 1).save(tmp_path / "other.wmatrix")
    own, other = str(pair.store / "pair.wmatrix"), str(tmp_path / "other.wmatrix")
    for folder, served, maps, reason in (
        ("all", pair.target, (other, own), None),
        ("without", pair.target, (other,), "the W-Matrix that made the latent"),
        ("source", pair.source, (own,), "the latent was made for"),
    ):
        (tmp_path / folder).mkdir()
        server = server_of_tenants(tmp_path / folder, served, wmatrices=maps)
        server.set_window(1 << 14)
        store = server.stores / "acme"
        store.mkdir(parents=True, exist_ok=True)
        memory = Path(shutil.copy(pair.path("latent"), store)).stem
        detail, report = server.get(memory), server.call(CHECK, memory).json()
        assert detail["latent_of"] == pair.ids["plain"]
        assert detail["compatibility"]["loadable"] == (reason is None)
        loaded = server.call(LOAD, memory)
        if reason is None:
            assert detail["compatibility"]["wmatrix"] == "pair.wmatrix"
            tokens = detail["compatibility"]["prompt_tokens"]
            assert report["tokens"] == tokens + len(pair.map.manifest.sink)
            assert loaded.status_code == 200, loaded.text
        else:
            assert report["tokens"] == read_manifest(pair.path("latent")).rows
            assert loaded.status_code == 422
            assert reason in loaded.text
            assert reason in detail["compatibility"]["reason"]


def test_no_certificate_has_measured_rounded_states(pair: Pair, tmp_path: Path) -> None:
    """Of a latent in int8, and of all memories in a cache in fp8."""
    certificate = certificate_with(0.875)
    certificate["plans"][0]["context"] = 1 << 14
    manifest = pair.map.manifest.model_copy(update={"certificate": certificate})
    replace(pair.map, manifest=manifest).save(tmp_path / "pair.wmatrix")
    server = server_of_tenants(tmp_path, pair.target, wmatrices=[str(tmp_path / "pair.wmatrix")])
    shutil.copytree(pair.store, server.stores / "acme", dirs_exist_ok=True)
    server.set_window(1 << 14)
    resolver, aligner = (
        server.resolver,
        KVCacheAligner(*pair[:2], wmatrix=tmp_path / "pair.wmatrix"),
    )
    checker = MemoryCompatibilityChecker([tmp_path / "pair.wmatrix"], store=pair.store)
    for name, basis in (("plain", "measured"), ("latent", "measured"), ("int8", "extrapolated")):
        answer = server.get(pair.ids[name])["compatibility"]
        assert (answer["retention"], answer["basis"]) == (0.875, basis)
        assert server.call(CHECK, pair.ids[name]).json()["basis"]["kind"] == basis
        state = aligner.align(pair.path(name))
        assert state.basis is not None
        assert (state.quality_score, state.basis.kind) == (0.875, basis)
        gains = [a for a in checker.check(pair.path(name), pair.target).actions if a.gain]
        expected = "measured" if basis == "measured" else "estimated"
        assert gains
        assert {action.basis for action in gains} == {expected}
        fp8 = checker.check(pair.path(name), pair.target, {"kv_cache_dtype": "fp8"})
        assert fp8.basis is not None
        assert fp8.basis.kind == "extrapolated"
        server.serve(resolver.with_model(replace(resolver.model, rounds=True)))
        assert server.get(pair.ids[name])["compatibility"]["basis"] == "extrapolated"
        server.serve(resolver)


@pytest.mark.parametrize(("dtype", "rounds"), [("auto", False), ("bfloat16", False), ("fp8", True)])
def test_a_server_knows_whether_its_cache_rounds(pair: Pair, dtype: str, rounds: bool) -> None:
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(pair.target), max_model_len=64, dtype=torch.bfloat16
        ),
        cache_config=SimpleNamespace(cache_dtype=dtype),
    )
    assert ServedModel.of(vllm_config).rounds == rounds
