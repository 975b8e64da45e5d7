"""The trust policy, and the keys and signatures that `awareness keygen` and `sign` make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from awareness_vllm.errors import BadInput, NotAvailable, SignatureInvalid
from awareness_vllm.trust.policy import Role, TrustPolicy, signature_path
from awareness_vllm.trust.signing import KeyPair, keygen, sign

pytestmark = pytest.mark.unit

CONTENT = b"states"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def alice(tmp_path: Path) -> KeyPair:
    return keygen(tmp_path / "alice")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mem.safetensors"
    path.write_bytes(CONTENT)
    return path


def write_trust(folder: Path, document: Any) -> Path:
    path = folder / "trust.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def trusting(pair: KeyPair, *roles: Role, name: str = "alice") -> TrustPolicy:
    entry = {"public_key": pair.public.name, "roles": roles or ("package", "wmatrix")}
    return TrustPolicy.read(write_trust(pair.public.parent, {"keys": {name: entry}}))


# Keys and signing


def test_a_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pair = keygen(tmp_path / "bob.2")
    finally:
        os.umask(before)
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert (pair.private.name, pair.public.name) == ("bob.2.key", "bob.2.pub")
    contents = [pair.private.read_bytes(), pair.public.read_bytes()]
    with pytest.raises(BadInput, match=r"bob\.2\.pub"):
        keygen(tmp_path / "bob.2")
    assert [pair.private.read_bytes(), pair.public.read_bytes()] == contents
    pair.public.unlink()
    with pytest.raises(BadInput, match=r"bob\.2\.key"):
        keygen(tmp_path / "bob.2")
    assert pair.private.read_bytes() == contents[0]
    assert [path.name for path in tmp_path.iterdir()] == ["bob.2.key"]


def test_a_signature_names_its_key(file: Path, alice: KeyPair) -> None:
    policy = trusting(alice)
    assert policy.signer(file, DIGEST, "package") is None
    assert sign(file, DIGEST, alice.private, signature_path(file, "package")) == alice.fingerprint
    assert policy.signer(file, DIGEST, "package") == "alice"
    assert policy.require(file, DIGEST, "package") == "alice"


def test_what_the_file_s_owner_did_not_check_is_not_signed(file: Path, alice: KeyPair) -> None:
    with pytest.raises(SignatureInvalid):
        sign(file, "0" * 64, alice.private, signature_path(file, "package"))
    assert not signature_path(file, "package").exists()


@pytest.mark.parametrize("kind", ["missing", "garbage", "public", "password", "rsa", "other curve"])
def test_a_key_that_cannot_sign_is_named(kind: str, file: Path, alice: KeyPair) -> None:
    path = file.with_name("bad.key")
    if kind == "garbage":
        path.write_bytes(b"\xff")
    elif kind == "public":
        path.write_bytes(alice.public.read_bytes())
    elif kind != "missing":
        secret = b"word" if kind == "password" else None
        path.write_bytes(other_key(kind, secret))
    with pytest.raises(BadInput, match=r"bad\.key"):
        sign(file, DIGEST, path, signature_path(file, "package"))
    assert not signature_path(file, "package").exists()


def other_key(kind: str, password: bytes | None) -> bytes:
    key: Any = ec.generate_private_key(ec.SECP256K1() if kind == "other curve" else ec.SECP256R1())
    if kind == "rsa":
        key = rsa.generate_private_key(65537, 2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


def test_without_the_library_the_error_names_the_extra(
    file: Path, alice: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(NotAvailable, match=r"\[sign\]"):
        sign(file, DIGEST, alice.private, signature_path(file, "package"))
    assert not signature_path(file, "package").exists()


# Whose signature counts


def signed(file: Path, pair: KeyPair, role: Role = "package") -> None:
    sign(
        file,
        hashlib.sha256(file.read_bytes()).hexdigest(),
        pair.private,
        signature_path(file, role),
    )


def test_without_a_trust_file_nobody_signed_anything(file: Path, alice: KeyPair) -> None:
    signature_path(file, "package").write_bytes(b"not even read")
    policy = TrustPolicy.read(None)
    assert not policy
    assert policy.signer(file, DIGEST, "package") is None
    signed(file, alice)
    assert policy.signer(file, DIGEST, "package") is None


def test_a_key_counts_in_its_roles_only(file: Path, alice: KeyPair) -> None:
    signed(file, alice)
    policy = trusting(alice, "wmatrix", "certificate")
    assert policy.signer(file, DIGEST, "wmatrix") == "alice"
    assert policy.signer(file, DIGEST, "package") is None
    with pytest.raises(SignatureInvalid, match="alice"):
        policy.require(file, DIGEST, "package")
    # A certificate's signature is a file of its own.
    assert policy.signer(file, DIGEST, "certificate") is None


def test_an_unknown_key_s_signature_says_as_much_as_none(
    file: Path, alice: KeyPair, tmp_path: Path
) -> None:
    stranger = keygen(tmp_path / "stranger")
    signed(file, stranger)
    policy = trusting(alice)
    assert policy.signer(file, DIGEST, "package") is None
    with pytest.raises(SignatureInvalid, match=stranger.fingerprint):
        policy.require(file, DIGEST, "package")
    (tmp_path / "nobody").mkdir()
    nobody = TrustPolicy.read(write_trust(tmp_path / "nobody", {"keys": {}}))
    assert nobody
    assert nobody.signer(file, DIGEST, "package") is None


def test_a_trusted_key_s_signature_of_other_bytes_is_an_error(file: Path, alice: KeyPair) -> None:
    signed(file, alice)
    policy = trusting(alice)
    file.write_bytes(b"other states")
    other = hashlib.sha256(b"other states").hexdigest()
    for role in ("package", "wmatrix"):
        with pytest.raises(SignatureInvalid, match=r"mem\.safetensors\.sig"):
            policy.signer(file, other, role)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "large", "empty", "garbage"])
def test_a_signature_file_that_is_none_is_an_error(
    kind: str, file: Path, alice: KeyPair, tmp_path: Path
) -> None:
    signature = signature_path(file, "package")
    signed(file, alice)
    policy = trusting(alice)
    bundle = signature.read_bytes()
    signature.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(bundle)
        signature.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        signature.mkdir()
    elif kind == "pipe":
        os.mkfifo(signature)
    else:
        signature.write_bytes({"large": bundle + b" " * 99_999, "empty": b""}.get(kind, b"\xff"))
    with pytest.raises(SignatureInvalid, match=r"mem\.safetensors\.sig"):
        policy.signer(file, DIGEST, "package")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 1 << 12), byte=st.integers(0, 255))
def test_one_changed_byte_never_makes_it_somebody_else_s(
    file: Path, alice: KeyPair, at: int, byte: int
) -> None:
    signature = signature_path(file, "package")
    if not file.with_name("bob.key").exists():
        bob = keygen(file.with_name("bob"))
        names = {"alice": alice, "bob": bob}
        keys = {
            name: {"public_key": pair.public.read_text(), "roles": ["package"]}
            for name, pair in names.items()
        }
        write_trust(file.parent, {"keys": keys})
        signed(file, alice)
        file.with_name("bundle").write_bytes(signature.read_bytes())
    policy = TrustPolicy.read(file.with_name("trust.json"))
    bundle = bytearray(file.with_name("bundle").read_bytes())
    bundle[at % len(bundle)] = byte
    signature.write_bytes(bundle)
    with contextlib.suppress(SignatureInvalid):
        assert policy.signer(file, DIGEST, "package") in ("alice", None)


# The trust file


def test_a_key_may_stand_in_the_trust_file_itself(file: Path, alice: KeyPair) -> None:
    signed(file, alice)
    entry = {"public_key": alice.public.read_text(), "roles": ["package"]}
    policy = TrustPolicy.read(write_trust(file.parent, {"keys": {"alice@example.org": entry}}))
    assert policy.signer(file, DIGEST, "package") == "alice@example.org"


BAD: dict[str, Any] = {
    "no JSON": "{",
    "no object": [],
    "no keys": {},
    "an unknown field": {"keys": {}, "key": {}},
    "a key twice": '{"keys": {}, "keys": {}}',
    "no roles": {"keys": {"a": {"public_key": "alice.pub", "roles": []}}},
    "an unknown role": {"keys": {"a": {"public_key": "alice.pub", "roles": ["root"]}}},
    "no public key": {"keys": {"a": {"roles": ["package"]}}},
    "an empty public key": {"keys": {"a": {"public_key": "", "roles": ["package"]}}},
    "a missing file": {"keys": {"a": {"public_key": "none.pub", "roles": ["package"]}}},
    "a path with a zero": {"keys": {"a": {"public_key": "a\0b", "roles": ["package"]}}},
    "a folder": {"keys": {"a": {"public_key": ".", "roles": ["package"]}}},
    "the private key": {"keys": {"a": {"public_key": "alice.key", "roles": ["package"]}}},
    "a broken PEM": {"keys": {"a": {"public_key": "-----BEGIN KEY", "roles": ["package"]}}},
    "a name with an escape": {"keys": {"a\x1b": {"public_key": "alice.pub", "roles": ["package"]}}},
    "a name with a line end": {"keys": {"a\n": {"public_key": "alice.pub", "roles": ["package"]}}},
    "an empty name": {"keys": {"": {"public_key": "alice.pub", "roles": ["package"]}}},
    "one key of two names": {
        "keys": {name: {"public_key": "alice.pub", "roles": ["package"]} for name in "ab"}
    },
}


@pytest.mark.parametrize("document", BAD.values(), ids=BAD)
def test_a_trust_file_that_cannot_be_used_is_named(document: Any, alice: KeyPair) -> None:
    path = write_trust(alice.public.parent, document)
    with pytest.raises(BadInput, match=r"trust\.json") as caught:
        TrustPolicy.read(path)
    assert "\x1b" not in str(caught.value)


def test_the_operator_may_link_to_trust_file_and_keys(file: Path, alice: KeyPair) -> None:
    """Mounted configuration is made of links. A signature comes with its file: it may be none."""
    signed(file, alice)
    trusting(alice)
    folder = file.parent / "mounted"
    folder.mkdir()
    for name in ("trust.json", "alice.pub"):
        (folder / name).symlink_to(file.parent / name)
    assert TrustPolicy.read(folder / "trust.json").signer(file, DIGEST, "package") == "alice"


def test_a_missing_trust_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.json"):
        TrustPolicy.read(tmp_path / "none.json")


def test_a_key_that_signs_no_bundles_is_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
    entry = {"public_key": pem, "roles": ["package"]}
    with pytest.raises(BadInput, match="RSA"):
        TrustPolicy.read(write_trust(tmp_path, {"keys": {"a": entry}}))
