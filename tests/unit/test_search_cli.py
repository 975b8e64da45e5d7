"""`awareness search`, `show`, `check` and `matrix` on what a registry lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_maps import random_map
from test_catalogue import data_of

from awareness_vllm.cli.main import main
from awareness_vllm.marketplace.files import push_file
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.repository import Repository
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.trust.policy import signature_path
from awareness_vllm.trust.signing import keygen
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_manifest

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]
CERTIFIED = Path(__file__).parents[2] / "maps" / "smollm2-135m--gemma3-270m.wmatrix"


@pytest.fixture
def offered(
    repository: Repository, make_package: Callable[..., Package], wmatrix: WMatrix, tmp_path: Path
) -> str:
    """A registry with a signed memory of the tiny model, and a certified map that leads from it."""
    keygen(tmp_path / "alice")
    entry = {"public_key": "alice.pub", "roles": ["package"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    memory = publish(make_package(), tmp_path / "author")
    assert main(["sign", str(memory), "--key", str(tmp_path / "alice.key")]) == 0
    push_file(memory, repository, name="A letter", description="from home", tags=["letter"])
    certificate = read_manifest(CERTIFIED).model_dump(mode="json")["certificate"]
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate})
    replace(wmatrix, manifest=manifest).save(tmp_path / "pair.wmatrix")
    push_file(tmp_path / "pair.wmatrix", repository)
    return str(repository.reference)


@pytest.fixture
def result(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The JSON document of a subcommand, which also prints something for people."""

    def run(*argv: str, status: int = 0) -> Any:
        capfd.readouterr()
        assert main([*argv, "--json"]) == status
        document = json.loads(capfd.readouterr().out)
        if not status:
            assert main([*argv]) == 0
            assert capfd.readouterr().out
        return document

    return run


def test_search(offered: str, result: Callable[..., Any]) -> None:
    where = ("--registry", offered)
    found = result("search", "LETTER", "hom", *where, "--tokens", "5-20", "--target", "target")
    (memory,) = found["listings"]
    assert (memory["tokens"], memory["source"], found["more"]) == (12, "tiny", False)
    assert result("search", *where, "--tokens", "5")["listings"] == []
    (wmatrix,) = result("search", *where, "--kind", "wmatrix", "--limit", "1")["listings"]
    assert wmatrix["standing"].startswith("certified")
    for words in (
        ("--tokens", "many"),
        ("--tokens", "9-3"),
        ("--kind", "wmatrix", "--tokens", "3"),
    ):
        assert result("search", *where, *words, status=1)["error"]["type"] == "BadInput"


def test_show(offered: str, result: Callable[..., Any], tmp_path: Path) -> None:
    shown = result("show", f"{offered}:letter", "--trust", str(tmp_path / "trust.json"))
    assert (shown["signatures"], shown["signers"]["package"]) == (["package"], "alice")
    assert shown["manifest"]["tokens"] == 12
    assert "signers" not in result("show", shown["id"], "--registry", offered)
    (wmatrix,) = result("search", "--registry", offered, "--kind", "wmatrix")["listings"]
    assert result("show", wmatrix["id"], "--registry", offered)["certified"]
    missing = result("show", "mem_xyz789", "--registry", offered, status=1)
    assert missing["error"]["type"] == "ArtefactNotFound"


def test_matrix(offered: str, result: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "matrix.html"
    drawn = result("matrix", "--registry", offered, "--html", str(page))
    (cell,) = drawn["matrix"]["cells"]
    assert (cell["source"], cell["target"], cell["basis"]["kind"]) == ("tiny", "target", "claimed")
    assert "claimed" in drawn["table"][0]
    assert 'class="key claimed' in page.read_text()
    local = result("matrix", "--wmatrix", str(tmp_path / "pair.wmatrix"), "--html", str(page))
    assert local["matrix"]["cells"][0]["basis"]["kind"] == "measured"
    assert "claimed" not in local["table"][0]
    both = ("--registry", offered, "--wmatrix", str(tmp_path))
    assert result("matrix", *both, status=1)["error"]["type"] == "BadInput"


@pytest.mark.parametrize("junk", [False, True])
def test_who_signed_a_listed_certificate(
    junk: bool, offered: str, result: Callable[..., Any], tmp_path: Path
) -> None:
    """The best of a pair is a stranger's claim; that of whom the trust file names counts."""
    path, key = tmp_path / "pair.wmatrix", str(tmp_path / "alice.key")
    manifest = read_manifest(path)
    assert manifest.certificate is not None
    figures = {"mean": 0.99, "ci_low": 0.98, "ci_high": 1.0}
    better = {**manifest.certificate, "retention": figures}
    claimed = replace(load(path), manifest=manifest.model_copy(update={"certificate": better}))
    claimed.save(tmp_path / "claimed.wmatrix")
    repository = open_repository(offered)
    push_file(tmp_path / "claimed.wmatrix", repository)
    assert main(["sign", str(path), "--key", key, "--certificate"]) == 0
    if junk:  # the stranger's map has a signature by the same key, of another certificate
        there = signature_path(path, "certificate")
        signature_path(tmp_path / "claimed.wmatrix", "certificate").write_bytes(there.read_bytes())
        push_file(tmp_path / "claimed.wmatrix", repository)
    push_file(path, repository)
    (tmp_path / "lab.pub").write_bytes((tmp_path / "alice.pub").read_bytes())
    entry = {"public_key": "lab.pub", "roles": ["certificate"]}
    trust = tmp_path / "lab.json"
    trust.write_text(json.dumps({"keys": {"lab": entry}}))
    page = tmp_path / "page.html"
    words = ("--registry", offered, "--html", str(page))
    drawn = result("matrix", *words)
    (cell,) = drawn["matrix"]["cells"]
    assert (cell["retention"]["mean"], cell["basis"]["kind"]) == (0.99, "claimed")
    assert "signed by" not in drawn["table"][0] + page.read_text()
    drawn = result("matrix", *words, "--trust", str(trust))
    (cell,) = drawn["matrix"]["cells"]
    assert (cell["basis"]["kind"], cell["signed_by"]) == ("measured", "lab")
    assert cell["retention"]["mean"] != 0.99
    assert drawn["table"][0].endswith("(signed by lab)")
    assert "<small>signed by lab</small>" in page.read_text()
    kept = round(cell["retention"]["mean"], 4)
    for more, signed in (((), (True, [])), (("--trust", str(trust)), (False, ["lab"]))):
        result("catalogue", *words, *more)
        who = {
            row[8]["retention"][0]: (
                row[8]["claimed"],
                [name for fact, name in row[9] if fact == "certificate signed by"],
            )
            for row in data_of(page.read_text())["maps"]
        }
        assert who == {0.99: (True, []), kept: signed}
    local = result("matrix", "--wmatrix", str(path), "--trust", str(trust))
    assert local["table"][0].endswith("(signed by lab)")


def test_check(offered: str, result: Callable[..., Any], wmatrix: WMatrix, tmp_path: Path) -> None:
    """The map at hand names the target, and leads nowhere from the memory; the listed one does."""
    source, target = wmatrix.manifest.source, wmatrix.manifest.target
    random_map(target, source, rank=5).save(tmp_path / "back.wmatrix")
    where = ("--registry", offered)
    file = next((tmp_path / "author").glob("mem_*.safetensors"))
    memories = [("letter", *where), (str(file), *where)]
    if offered.startswith("oci://"):
        memories.append((f"{offered}:letter",))
    for words in memories:
        argv = (*words, "--wmatrix", str(tmp_path / "back.wmatrix"), "--target", "target")
        report = result("check", *argv)
        assert (report["tokens"], report["refusal"]) == (12, None)
        assert "not pulled" in report["basis"]["source"]
        assert report["basis"]["kind"] == "claimed"
    assert result("check", "mem_x", *where, "--target", "target", status=1)["error"]
