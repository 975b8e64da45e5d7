"""Repositories of the Hugging Face hub: what is exported, and what is pulled from its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from awareness_vllm.errors import AwarenessError, BadInput, PackageCorrupt, SignatureInvalid
from awareness_vllm.files import file_digest
from awareness_vllm.marketplace.card import card
from awareness_vllm.marketplace.files import artefact_of, listing_in
from awareness_vllm.marketplace.hub import export_folder, is_hub_folder, pull_folder
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import StoredLatent
from awareness_vllm.trust.policy import TrustPolicy, signature_path
from awareness_vllm.trust.signing import keygen, sign
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit
TEXT = "Anna Kowalski works as a gardener."
HOSTILE = (
    """- <img src=x onerror=a> [b](javascript:c) ![d](http://e) https://f.gg `g` | --- {{1}}"""
)
COMMIT = "0" * 40


@pytest.fixture
def package_file(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    return publish(make_package(TEXT), tmp_path / "author")


@pytest.fixture
def map_file(wmatrix: WMatrix, tmp_path: Path) -> Path:
    certificate = load(Path(__file__).parents[1] / "data/v0.1/pair.wmatrix").manifest.certificate
    names = {"source": wmatrix.manifest.source.model_copy(update={"name": HOSTILE})}
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate, **names})
    replace(wmatrix, manifest=manifest).save(tmp_path / "a.wmatrix")
    return tmp_path / "a.wmatrix"


def html_of(card: ModelCard) -> str:
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.text))


def cached(exported: Path, hub: Path) -> Path:
    """The hub's cache after a download of an exported folder."""
    repository = hub / "models--me--it"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for i, file in enumerate(sorted(exported.iterdir())):
        (repository / "blobs" / f"{i:040x}").write_bytes(file.read_bytes())
        (repository / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{i:040x}")
    return repository


def pull_one(*args: Any, **options: Any) -> Path:
    (pulled,) = pull_folder(*args, **options)
    return pulled.path


def test_a_memorys_repository(package_file: Path, tmp_path: Path) -> None:
    facts = {"name": HOSTILE, "description": HOSTILE, "license": "CC0-1.0"}
    done = export_folder(package_file, tmp_path / "out", base_models=["me/tiny"], **facts)
    name = package_file.name
    assert done.files == (".gitattributes", "README.md", name)
    assert (tmp_path / "out" / name).read_bytes() == package_file.read_bytes()
    assert "*.safetensors filter=lfs" in (tmp_path / "out/.gitattributes").read_text()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict() == {
        "license": "cc0-1.0",
        "library_name": "awareness-vllm",
        "base_model": ["me/tiny"],
        "tags": ["awareness-vllm", "memory-package", "kv-cache"],
    }
    assert "Anna" not in card.content
    html = html_of(card)
    assert f"<code>{package_file.stem}</code>" in html
    assert html.count("&lt;img src=x onerror=a&gt; [b](javascript:c) ![d](http://e)") == 2
    assert not [tag for tag in ("<img", "<a ", "<li", "onerror=a>") if tag in html]


def test_a_maps_repository_has_its_certificate(map_file: Path, tmp_path: Path) -> None:
    export_folder(map_file, tmp_path / "out", license="LicenseRef-mine")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict()["license"] == "other"
    assert card.data.to_dict()["license_name"] == "LicenseRef-mine"
    html = html_of(card)
    certificate = load(map_file).manifest.measured
    assert certificate is not None
    for plan in certificate.plans:
        assert f"<td>{plan.retention.mean:.3f} ({plan.retention.ci_low:.3f}" in html
    assert "nobody has signed" in html
    assert "<img" not in html
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in html


def test_a_latents_card_says_which_map_it_is_for(package_file: Path, wmatrix: WMatrix) -> None:
    listing = listing_in(artefact_of(package_file))
    assert isinstance(listing, PackageListing)
    latent = StoredLatent(
        package=listing.id,
        wmatrix="f" * 64,
        target=wmatrix.manifest.target,
        tokens=9,
        rank=5,
        dtype="int8",
    )
    update = {"format": "awareness-latent/1", "latent": latent}
    manifest = listing.manifest.model_copy(update=update)
    text = card(listing.model_copy(update={"manifest": manifest}), "a.safetensors", {})
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert rows["for"].startswith("target: 3 layers")
    assert rows["latent of"] == f"`{listing.id}`"
    assert rows["W-Matrix, tensors' sha256"] == f"`{latent.wmatrix}`"


def test_an_export_takes_no_folder_that_is_in_use(package_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="new or an empty folder"):
        export_folder(package_file, package_file.parent)
    with pytest.raises(BadInput, match="label"):
        export_folder(package_file, tmp_path / "out", name="a\nb")
    other = package_file.rename(package_file.with_stem("mem_" + "0" * 32))
    with pytest.raises(PackageCorrupt, match="its bytes are those of"):
        export_folder(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_come_out_of_the_hubs_cache(
    package_file: Path, map_file: Path, tmp_path: Path
) -> None:
    for i, path in enumerate((package_file, map_file)):
        repository = cached(export_folder(path, tmp_path / f"{i}").folder, tmp_path / f"hub{i}")
        snapshot = repository / "snapshots" / COMMIT
        for where in (repository, snapshot, tmp_path / f"{i}"):
            assert is_hub_folder(where)
            pulled = pull_one(where, tmp_path / "s", tmp_path / "w")
            assert pulled.read_bytes() == path.read_bytes()
            assert not pulled.is_symlink()
            assert pulled.name == path.name
    assert not is_hub_folder(tmp_path / "hub0")


def test_a_link_out_of_the_cache_is_not_followed(package_file: Path, tmp_path: Path) -> None:
    exported = export_folder(package_file, tmp_path / "out").folder
    link = cached(exported, tmp_path / "hub") / "snapshots" / COMMIT / package_file.name
    link.unlink()
    link.symlink_to(package_file)
    (exported / package_file.name).unlink()
    (exported / package_file.name).symlink_to(package_file)
    for folder in (link.parent, exported):
        with pytest.raises(AwarenessError, match="a link out of its repository"):
            pull_folder(folder, tmp_path / "s", tmp_path / "w")
    assert list((tmp_path / "s").iterdir()) == []


def test_what_is_pulled_passes_the_trust_policy(
    package_file: Path, map_file: Path, tmp_path: Path
) -> None:
    pair = keygen(tmp_path / "alice")
    entry = {"public_key": str(pair.public), "roles": ["package", "wmatrix", "certificate"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    trust = TrustPolicy.read(tmp_path / "trust.json")
    places = tmp_path / "s", tmp_path / "w"
    unsigned = export_folder(map_file, tmp_path / "unsigned").folder
    with pytest.raises(SignatureInvalid, match="not signed"):
        pull_folder(unsigned, *places, trust=trust, require_signed=True)
    statement = load(map_file).manifest.certificate_statement
    assert statement is not None
    (tmp_path / "statement").write_bytes(statement)
    for path, about, role in (
        (package_file, package_file, "package"),
        (map_file, map_file, "wmatrix"),
        (map_file, tmp_path / "statement", "certificate"),
    ):
        sign(about, file_digest(about), pair.private, signature_path(path, role))
    for i, (path, signatures) in enumerate(((package_file, 1), (map_file, 2))):
        repository = cached(export_folder(path, tmp_path / f"{i}").folder, tmp_path / f"hub{i}")
        card = (tmp_path / f"{i}/README.md").read_text()
        assert card.count(f"with the key `{pair.fingerprint}`") == signatures
        pulled = pull_one(repository, *places, trust=trust, require_signed=True)
        beside = {file.name for file in pulled.parent.iterdir()} - {pulled.name}
        assert len(beside) == signatures
        assert pulled.name + ".sig" in beside
    # Neither a signature of other bytes, nor another map in the place of the one that is there.
    package_file.with_name(package_file.name + ".sig").write_bytes(
        map_file.with_name(map_file.name + ".sig").read_bytes()
    )
    with pytest.raises(SignatureInvalid, match="cannot be trusted"):
        export_folder(package_file, tmp_path / "swapped")
    wmatrix = load(map_file)
    replace(wmatrix, bias=wmatrix.bias + 1).save(map_file)
    with pytest.raises(SignatureInvalid):
        export_folder(map_file, tmp_path / "stale")
    for signature in map_file.parent.glob("*.sig"):
        signature.unlink()
    other = export_folder(map_file, tmp_path / "other").folder
    assert pull_one(other, *places).name.startswith("a.")
    assert len(list((tmp_path / "w").glob("*.wmatrix"))) == 2
