"""`awareness keygen`, `sign` and `verify --trust` on packages, W-Matrices and certificates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awareness_vllm.cli.main import main
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit

ROLES = ("package", "wmatrix", "certificate")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Runs a subcommand in a folder with the keys of alice (all roles) and bob (certificates)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, status: int = 0) -> Any:
        capfd.readouterr()
        assert main([*argv, "--json"]) == status
        return json.loads(capfd.readouterr().out)

    for name in ("alice", "bob"):
        assert run("keygen", name)["public_key"] == f"{name}.pub"
    keys = {
        "alice": {"public_key": "alice.pub", "roles": ROLES},
        "bob": {"public_key": "bob.pub", "roles": ["certificate"]},
    }
    Path("trust.json").write_text(json.dumps({"keys": keys}))
    return run


@pytest.fixture
def certified(wmatrix: WMatrix, tmp_path: Path) -> Path:
    certificate = load(Path(__file__).parents[1] / "data/v0.1/pair.wmatrix").manifest.certificate
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate})
    replace(wmatrix, manifest=manifest).save(tmp_path / "a.wmatrix")
    return tmp_path / "a.wmatrix"


def test_a_package_is_signed_and_verified(
    run: Callable[..., Any], make_package: Callable[..., Package], tmp_path: Path
) -> None:
    path = publish(make_package(), tmp_path / "store")
    what = (path.stem, "--store", "store")
    assert "signed_by" not in run("verify", *what)
    error = run("verify", *what, "--trust", "trust.json", status=1)["error"]
    assert error["type"] == "SignatureInvalid"
    signed = run("sign", *what, "--key", "alice.key")
    assert signed["signature"] == f"store/{path.name}.sig"
    verified = run("verify", *what, "--trust", "trust.json")
    assert (verified["signed_by"], verified["id"]) == ("alice", path.stem)
    # The signature goes with the bytes, not with the name or the place.
    for name in (path.name, f"{path.name}.sig"):
        (tmp_path / name.replace(path.stem, "report")).write_bytes(
            (path.parent / name).read_bytes()
        )
    assert run("verify", "report.safetensors", "--trust", "trust.json")["signed_by"] == "alice"
    run("sign", *what, "--key", "bob.key")
    error = run("verify", *what, "--trust", "trust.json", status=1)["error"]
    assert "bob" in error["found"]


def test_an_altered_file_is_not_signed(
    run: Callable[..., Any], make_package: Callable[..., Package], tmp_path: Path
) -> None:
    path = publish(make_package(), tmp_path)
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    assert run("sign", path.name, "--key", "alice.key", status=1)["error"]["type"] == (
        "PackageCorrupt"
    )
    assert not list(tmp_path.glob("*.sig"))


def test_a_certificate_has_a_signature_of_its_own(run: Callable[..., Any], certified: Path) -> None:
    verify = ("verify", "a.wmatrix", "--trust", "trust.json")
    assert run("sign", "a.wmatrix", "--key", "alice.key")["role"] == "wmatrix"
    verified = run(*verify)
    assert (verified["signed_by"], verified["certificate_signed_by"]) == ("alice", None)
    signed = run("sign", "a.wmatrix", "--key", "bob.key", "--certificate")
    assert signed["signature"] == "a.wmatrix.certificate.sig"
    verified = run(*verify)
    assert (verified["signed_by"], verified["certificate_signed_by"]) == ("alice", "bob")
    # Neither stands for the other: bob may not sign maps, and these are other bytes.
    Path("a.wmatrix.certificate.sig").replace("a.wmatrix.sig")
    assert run(*verify, status=1)["error"]["type"] == "SignatureInvalid"


def test_a_changed_or_moved_certificate_is_not_signed(
    run: Callable[..., Any], certified: Path, wmatrix: WMatrix
) -> None:
    run("sign", "a.wmatrix", "--key", "bob.key", "--certificate")
    original = load(certified)
    document = json.loads(json.dumps(original.manifest.certificate))
    document["retention"]["mean"] += 1e-9
    better = original.manifest.model_copy(update={"certificate": document})
    other = replace(original, bias=original.bias + 1)
    for forged in (replace(original, manifest=better), other):
        forged.save(certified)
        run("sign", "a.wmatrix", "--key", "alice.key")
        error = run("verify", "a.wmatrix", "--trust", "trust.json", status=1)["error"]
        assert "certificate.sig" in error["message"]
    original.save(certified)
    run("sign", "a.wmatrix", "--key", "alice.key")
    assert run("verify", "a.wmatrix", "--trust", "trust.json")["certificate_signed_by"] == "bob"


def test_without_a_certificate_there_is_none_to_sign(
    run: Callable[..., Any], wmatrix: WMatrix, tmp_path: Path
) -> None:
    wmatrix.save(tmp_path / "b.wmatrix")
    error = run("sign", "b.wmatrix", "--key", "alice.key", "--certificate", status=1)["error"]
    assert error["type"] == "BadInput"
    run("sign", "b.wmatrix", "--key", "alice.key")
    verified = run("verify", "b.wmatrix", "--trust", "trust.json")
    assert "certificate_signed_by" not in verified


def test_a_package_s_certificate_is_not_asked_for(
    run: Callable[..., Any], make_package: Callable[..., Package], tmp_path: Path
) -> None:
    path = publish(make_package(), tmp_path)
    error = run("sign", path.name, "--key", "alice.key", "--certificate", status=1)["error"]
    assert (error["type"], error["found"]) == ("BadInput", path.name)


def test_people_read_it_too(
    run: Callable[..., Any], certified: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for argv in (
        ["keygen", "carol"],
        ["sign", "a.wmatrix", "--key", "alice.key"],
        ["verify", "a.wmatrix", "--trust", "trust.json"],
    ):
        assert main(argv) == 0
    out = capfd.readouterr().out
    for part in ("carol.key", "a.wmatrix.sig", "signed by alice", "claimed"):
        assert part in out


def test_list_inspect_and_check_say_who_signed(
    run: Callable[..., Any],
    make_package: Callable[..., Package],
    certified: Path,
    wmatrix: WMatrix,
    tmp_path: Path,
) -> None:
    paths = [publish(make_package(seed=seed), tmp_path / "store") for seed in range(3)]
    for path in paths[:2]:
        run("sign", str(path), "--key", "alice.key")
    broken = paths[1].with_name(f"{paths[1].name}.sig")
    broken.write_bytes(broken.read_bytes() + b"}")
    trust, store = ("--trust", "trust.json"), ("--store", "store")
    listed = run("list", *store, *trust)["memories"]
    rows = {row["id"]: (row.get("signed_by"), bool(row["error"])) for row in listed}
    assert rows == dict(
        zip((p.stem for p in paths), (("alice", False), (None, True), (None, False)), strict=True)
    )
    assert "signed_by" not in run("list", *store)["memories"][0]
    assert run("inspect", paths[0].stem, *store, *trust)["signed_by"] == "alice"
    assert "signed_by" not in run("inspect", paths[0].stem, *store)
    run("sign", "a.wmatrix", "--key", "alice.key")
    run("sign", "a.wmatrix", "--key", "bob.key", "--certificate")
    inspected = run("inspect", "a.wmatrix", *trust)
    assert (inspected["signed_by"], inspected["certificate_signed_by"]) == ("alice", "bob")
    target = wmatrix.manifest.target.name
    report = run(
        "check", paths[0].stem, *store, *trust, "--wmatrix", "a.wmatrix", "--target", target
    )
    assert report["signed_by"] == {"package": "alice", "wmatrix": "alice", "certificate": "bob"}
    assert report["basis"]["kind"] == "measured"
    Path("a.wmatrix.certificate.sig").unlink()
    report = run(
        "check", paths[2].stem, *store, *trust, "--wmatrix", "a.wmatrix", "--target", target
    )
    assert report["signed_by"] == {"package": None, "wmatrix": "alice", "certificate": None}
    assert report["basis"]["kind"] == "claimed"


def test_a_package_altered_after_it_was_signed_is_nobody_s(
    run: Callable[..., Any], make_package: Callable[..., Package], tmp_path: Path
) -> None:
    """A listing shows what the file says of itself: a signature beside it must be of these bytes,
    not of its name."""
    path, other = (publish(make_package(seed=seed), tmp_path / "store") for seed in range(2))
    run("sign", str(path), "--key", "alice.key")
    path.write_bytes(other.read_bytes())
    rows = {
        row["id"]: row
        for row in run("list", "--store", "store", "--trust", "trust.json")["memories"]
    }
    assert "signed_by" not in rows[path.stem]
    assert rows[path.stem]["error"]
    what = (path.stem, "--store", "store", "--trust", "trust.json")
    assert run("inspect", *what, status=1)["error"]["type"] == "PackageCorrupt"
