"""Whom a server believes: `--trust` and `--require-signed` on its maps and packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memories_server import CHECK, LOAD, Make, Server, certificate_with, server_of_tenants

from awareness_vllm.cli.main import main
from awareness_vllm.errors import AwarenessError, BadInput, QualityUnreachable, SignatureInvalid
from awareness_vllm.files import file_digest
from awareness_vllm.packages.capture import capture
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.launch import serving_config
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.trust.policy import Role, Signers, signature_path
from awareness_vllm.trust.signing import KeyPair, keygen, sign
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit

Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyPair]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: keygen(folder / name) for name in ("alice", "stranger")}


@pytest.fixture
def trust(keys: dict[str, KeyPair], tmp_path: Path) -> Path:
    """A trust file with alice's key, for everything."""
    entry = {
        "public_key": str(keys["alice"].public),
        "roles": ["package", "wmatrix", "certificate"],
    }
    path = tmp_path / "trust.json"
    path.write_text(json.dumps({"keys": {"alice": entry}}))
    return path


@pytest.fixture
def served(tmp_path: Path, tiny_models: tuple[Path, Path], trust: Path) -> Serve:
    """A server with the trust file; `signed` is what must be signed."""

    def serve(signed: str | None = None) -> Server:
        return server_of_tenants(tmp_path, tiny_models[1], trust=str(trust), require_signed=signed)

    return serve


@pytest.fixture
def foreign(
    tiny_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Server], str]:
    """Puts a memory of the served model into acme's store that was captured elsewhere."""

    def put(server: Server) -> str:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("AWARENESS_HOME", str(tmp_path / "elsewhere"))
            return server.publish(capture(tiny_models[1], "a stranger's words"))

    return put


def signed(path: Path, pair: KeyPair, role: Role = "package") -> None:
    sign(path, file_digest(path), pair.private, signature_path(path, role))


def refusal(server: Server, memory: str) -> str:
    """Why a memory is refused, which all routes say alike."""
    reason = server.get(memory)["compatibility"]["reason"]
    response = server.call(LOAD, memory)
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith(reason)
    report = server.call(CHECK, memory).json()
    assert (report["refusal"], report["compatibility_score"]) == (reason, 0.0)
    return reason


# Packages


def test_where_all_is_signed_an_unsigned_package_is_refused(
    served: Serve, foreign: Callable[[Server], str], keys: dict[str, KeyPair]
) -> None:
    server = served("all")
    memory = foreign(server)
    assert memory in refusal(server, memory)
    signed(server.path(memory), keys["stranger"])
    assert keys["stranger"].fingerprint in refusal(server, memory)
    # No restart is needed: the signature's file is looked at anew.
    signed(server.path(memory), keys["alice"])
    assert server.call(LOAD, memory).status_code == 200
    signature_path(server.path(memory), "package").unlink()
    refusal(server, memory)


def test_what_this_home_captured_needs_no_signature(
    served: Serve, tiny_models: tuple[Path, Path]
) -> None:
    server = served("all")
    memory = server.publish(capture(tiny_models[1], "our own words"))
    assert server.call(LOAD, memory).status_code == 200


@pytest.mark.parametrize("what", [None, "none", "wmatrix"])
def test_elsewhere_it_is_only_said_who_signed(
    served: Serve, foreign: Callable[[Server], str], keys: dict[str, KeyPair], what: str | None
) -> None:
    server = served(what)
    memory = foreign(server)
    request = MemoryRequest(ids=(memory,))
    reports, salts = [], []
    for pair in (None, keys["stranger"], keys["alice"]):
        if pair:
            signed(server.path(memory), pair)
        signers = [one["signed_by"] for one in server.get()["data"]]
        assert signers == [server.get(memory)["signed_by"]]
        prompt = server.resolver.resolve(request, "acme")
        assert server.call(CHECK, memory).json()["signed_by"]["package"] == signers[0]
        reports.append((signers[0], prompt.report()["signed_by"], prompt.report()["origin"]))
        assert prompt.params
        salts.append(prompt.params.cache_salt)
    nobody = {"package": None, "wmatrix": None, "certificate": None}
    assert reports == [
        (None, [nobody], ["claimed"]),
        (None, [nobody], ["claimed"]),
        ("alice", [nobody | {"package": "alice"}], ["signed"]),
    ]
    # What was computed while a key counted is not used when it does not.
    assert salts[0] == salts[1] != salts[2]


def test_a_signature_of_other_bytes_is_refused_everywhere(
    served: Serve, foreign: Callable[[Server], str], make_package: Make, keys: dict[str, KeyPair]
) -> None:
    server = served()
    memory, other = foreign(server), server.publish(make_package())
    signed(server.path(other), keys["alice"])
    signature_path(server.path(other), "package").replace(
        signature_path(server.path(memory), "package")
    )
    assert "sig" in refusal(server, memory)
    (row,) = (one for one in server.get()["data"] if one["id"] == memory)
    assert (row["signed_by"], "sig" in row["error"]) == (None, True)


def test_without_a_trust_file_signatures_are_not_looked_at(
    server: Server, tiny_models: tuple[Path, Path], keys: dict[str, KeyPair]
) -> None:
    memory = server.publish(capture(tiny_models[1], "words"))
    signature_path(server.path(memory), "package").write_bytes(b"nothing of the kind")
    assert server.get(memory)["signed_by"] is None
    assert server.call(LOAD, memory).status_code == 200


# W-Matrices


@pytest.fixture
def path(wmatrix: WMatrix, tmp_path: Path) -> Path:
    wmatrix.save(tmp_path / "pair.wmatrix")
    return tmp_path / "pair.wmatrix"


def start(path: Path, model: Path, trust: Path | None, what: str | None = None) -> MemoryResolver:
    """A resolver as the server has it, after `awareness serve` has checked the same."""
    options: dict[str, Any] = {"trust": trust, "require_signed": what}
    config = serving_config(path.parent, [path], **options)
    assert config == ServingConfig.parse(json.loads(config.model_dump_json()))
    return MemoryResolver.from_config(config, ServedModel.read(model, 1000))


@pytest.mark.parametrize("what", [None, "wmatrix", "all"])
def test_with_a_trust_file_an_unsigned_map_stops_the_start(
    path: Path, tiny_models: tuple[Path, Path], trust: Path, keys: dict[str, KeyPair], what: str
) -> None:
    for pair in (None, keys["stranger"]):
        if pair:
            signed(path, pair, "wmatrix")
        with pytest.raises(SignatureInvalid, match=r"pair\.wmatrix"):
            start(path, tiny_models[1], trust, what)
        # By hand, with `vllm serve`, the front end finds the same.
        config = ServingConfig(
            store=".", wmatrices=(str(path),), trust=str(trust), require_signed=what
        )
        with pytest.raises(SignatureInvalid, match=r"pair\.wmatrix"):
            MemoryResolver.from_config(config, ServedModel.read(tiny_models[1], 1000))
    signed(path, keys["alice"], "wmatrix")
    (entry,) = start(path, tiny_models[1], trust, what).registry
    assert entry.signed_by == "alice"


def test_a_signature_beside_a_link_is_the_link_s(
    path: Path, tiny_models: tuple[Path, Path], trust: Path, keys: dict[str, KeyPair]
) -> None:
    folder = path.parent / "maps"
    folder.mkdir()
    (folder / "a.wmatrix").symlink_to(path)
    signed(folder / "a.wmatrix", keys["alice"], "wmatrix")
    (entry,) = start(folder / "a.wmatrix", tiny_models[1], trust).registry
    assert (entry.signed_by, entry.path.name) == ("alice", "a.wmatrix")


def test_an_operator_may_ask_for_no_signature(
    path: Path, tiny_models: tuple[Path, Path], trust: Path
) -> None:
    (entry,) = start(path, tiny_models[1], trust, "none").registry
    assert entry.signed_by is None


@pytest.mark.parametrize("what", ["wmatrix", "all"])
def test_nothing_is_signed_without_a_trust_file(
    path: Path, tiny_models: tuple[Path, Path], what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="trust"):
        start(path, tiny_models[1], None, what)
    argv = ["serve", str(tiny_models[1]), "--require-signed", what, "--json"]
    assert main(argv) == 1
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "BadInput"


def test_a_trust_file_that_cannot_be_used_stops_the_start(
    path: Path, tiny_models: tuple[Path, Path], trust: Path
) -> None:
    trust.write_text("{}")
    with pytest.raises(BadInput, match=r"trust\.json"):
        start(path, tiny_models[1], trust, "none")


def test_of_several_maps_the_operator_s_first_is_used(wmatrix: WMatrix, tmp_path: Path) -> None:
    """Whatever they promise of themselves, and in whatever order their names are."""
    paths = []
    for name, kept in (("z", 0.5), ("a", 0.99)):
        path = tmp_path / f"{name}.wmatrix"
        manifest = wmatrix.manifest.model_copy(update={"certificate": certificate_with(kept)})
        replace(wmatrix, manifest=manifest).save(path)
        paths.append(path)
    source, target = wmatrix.manifest.source, wmatrix.manifest.target
    for order in (paths, paths[::-1]):
        assert Registry.read(order).find(source, target, has_text=True).path == order[0]
    assert Registry.read([tmp_path]).find(source, target, has_text=True).path.name == "a.wmatrix"


# Certificates


@pytest.mark.parametrize("who", [None, "stranger", "alice"])
def test_a_claimed_certificate_is_shown_and_reaches_no_quality_target(
    served: Serve,
    wmatrix: WMatrix,
    make_package: Make,
    keys: dict[str, KeyPair],
    trust: Path,
    tmp_path: Path,
    who: str | None,
) -> None:
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate_with(0.9)})
    path = tmp_path / "pair.wmatrix"
    replace(wmatrix, manifest=manifest).save(path)
    signed(path, keys["alice"], "wmatrix")
    if who:
        argv = ["sign", str(path), "--certificate", "--key", str(keys[who].private)]
        assert main(argv) == 0
    server = served()
    (entry,) = Registry.read([path], server.resolver.trust)
    assert entry.certificate_signed_by == (who if who == "alice" else None)
    assert entry.claimed == (who != "alice")
    server.add_map(wmatrix, 0.9)
    (leading,) = server.resolver.registry
    entry = replace(entry, manifest=leading.manifest)
    server.resolver.registry = Registry((entry,))
    memory = server.publish(make_package("longer than the tail of sixteen tokens " * 3))
    check_quality(server, memory, entry)


def check_quality(server: Server, memory: str, entry: WMatrixEntry) -> None:
    """A map's certificate counts for a quality target where it is not merely claimed."""
    detail, report = server.get(memory)["compatibility"], server.call(CHECK, memory).json()
    assert (detail["retention"], detail["claimed"]) == (0.9, entry.claimed)
    assert detail["certificate_signed_by"] == entry.certificate_signed_by
    assert report["basis"]["kind"] == ("claimed" if entry.claimed else "measured")
    assert report["signed_by"]["certificate"] == entry.certificate_signed_by
    assert any("claimed" in risk["description"] for risk in report["risk_factors"]) == entry.claimed
    request = {"ids": (memory,), "quality_target": 0.5}
    resolver = server.resolver
    usable = resolver.resolve(MemoryRequest(**request, on_low_quality="use"), "acme")
    assert usable.loads
    assert usable.report()["signed_by"] == [
        Signers(wmatrix="alice", certificate=entry.certificate_signed_by).model_dump()
    ]
    try:
        resolver.resolve(MemoryRequest(**request, on_low_quality="fail"), "acme")
        refused: AwarenessError | None = None
    except QualityUnreachable as error:
        refused = error
    assert (refused is not None) == entry.claimed
    assert refused is None or "claimed" in str(refused)
    assert resolver.resolve(MemoryRequest(**request), "acme").loads != entry.claimed
