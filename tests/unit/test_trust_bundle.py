"""Bundles: what model-signing makes of one file verifies, and nothing else does."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from model_signing import hashing, signing

from awareness_vllm.errors import SignatureInvalid
from awareness_vllm.trust.bundle import HASHES, MAX_BUNDLE, fingerprint, verify

pytestmark = pytest.mark.unit

Document = dict[str, Any]
Key = ec.EllipticCurvePrivateKey


def save_key(key: Key, path: Path) -> Path:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def signed(file: Path, key: Key, config: hashing.Config | None = None) -> bytes:
    """The bundle that the library makes of a file or folder."""
    pem = save_key(key, file.with_name("a.key"))
    signer = signing.Config().use_elliptic_key_signer(private_key=pem)
    signer.set_hashing_config(config or hashing.Config())
    signer.sign(file, file.with_name("a.sig"))
    return file.with_name("a.sig").read_bytes()


@dataclass(frozen=True)
class Case:
    """A file's sha256, its bundle, and the keys: `alice` signed it, `bob` did not."""

    digest: str
    bundle: bytes
    alice: Key
    bob: Key

    def verify(self, bundle: bytes | Document, digest: str | None = None) -> str:
        raw = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
        keys = {"bob": self.bob.public_key(), "alice": self.alice.public_key()}
        return verify(raw, self.digest if digest is None else digest, keys)

    @property
    def document(self) -> Document:
        return json.loads(self.bundle)

    @property
    def statement(self) -> Document:
        return json.loads(base64.b64decode(self.document["dsseEnvelope"]["payload"]))

    def resigned(self, payload: bytes, payload_type: str = "application/vnd.in-toto+json") -> bytes:
        """A bundle whose signature of other bytes is alice's own."""
        document = self.document
        pae = b"DSSEv1 %d %s %d %s" % (
            len(payload_type),
            payload_type.encode(),
            len(payload),
            payload,
        )
        signature = self.alice.sign(pae, ec.ECDSA(HASHES[self.alice.curve.name]))
        envelope = document["dsseEnvelope"]
        envelope["payload"] = base64.b64encode(payload).decode()
        envelope["payloadType"] = payload_type
        envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
        return json.dumps(document).encode()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    file = tmp_path_factory.mktemp("signed") / "mem.safetensors"
    file.write_bytes(bytes(range(256)) * 40)
    alice, bob = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Case(digest, signed(file, alice), alice, bob)


def test_the_key_that_signed_is_named(case: Case) -> None:
    assert case.verify(case.bundle) == "alice"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
@pytest.mark.parametrize("content", [b"", b"model", os.urandom(3000)])
def test_every_curve_and_content_of_the_specification(
    curve: ec.EllipticCurve, content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    key = ec.generate_private_key(curve)
    digest = hashlib.sha256(content).hexdigest()
    assert verify(signed(file, key), digest, {"key": key.public_key()}) == "key"


def test_a_folder_of_one_file_is_signed_as_that_file(tmp_path: Path, case: Case) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.bin").write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    assert case.verify(signed(tmp_path / "folder", case.alice), digest) == "alice"


def test_other_bytes_and_other_keys_are_refused(case: Case) -> None:
    with pytest.raises(SignatureInvalid, match="0" * 64):
        case.verify(case.bundle, "0" * 64)
    with pytest.raises(SignatureInvalid, match=fingerprint(case.alice.public_key())):
        verify(case.bundle, case.digest, {"bob": case.bob.public_key()})
    claimed = case.document
    claimed["verificationMaterial"]["publicKey"]["hint"] = fingerprint(case.bob.public_key())
    with pytest.raises(SignatureInvalid):
        case.verify(claimed)


def test_a_digest_may_be_known_by_its_first_half_and_not_by_less(case: Case) -> None:
    """A package's ID is half of its digest; a few digits are anybody's."""
    assert case.verify(case.bundle, case.digest[:32]) == "alice"
    for part in (case.digest[:31], "", case.digest[32:], case.digest + "0"):
        with pytest.raises(SignatureInvalid):
            case.verify(case.bundle, part)


def test_the_bundle_of_another_file_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    other = json.loads(signed(tmp_path / "other", case.alice))
    with pytest.raises(SignatureInvalid):
        case.verify(other)
    swapped = case.document
    swapped["dsseEnvelope"]["signatures"] = other["dsseEnvelope"]["signatures"]
    with pytest.raises(SignatureInvalid):
        case.verify(swapped)


def edited(document: Document, *path: str | int, value: Any) -> Document:
    """A copy with another value at a path; a value of None removes what is there."""
    document = copy.deepcopy(document)
    part: Any = document
    for name in path[:-1]:
        part = part[name]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return document


ENVELOPE = "dsseEnvelope"
BUNDLES: dict[str, Callable[[Document], Any]] = {
    "no object": lambda d: [d],
    "another media type": lambda d: edited(d, "mediaType", value="application/json"),
    "no envelope": lambda d: edited(d, ENVELOPE, value=None),
    "no signature": lambda d: edited(d, ENVELOPE, "signatures", value=[]),
    "two signatures": lambda d: edited(
        d, ENVELOPE, "signatures", value=d[ENVELOPE]["signatures"] * 2
    ),
    "a key id": lambda d: edited(d, ENVELOPE, "signatures", 0, "keyid", value="alice"),
    "no key": lambda d: edited(d, "verificationMaterial", "publicKey", value=None),
    "no hint": lambda d: edited(d, "verificationMaterial", "publicKey", "hint", value=None),
    "a certificate": lambda d: edited(
        d, "verificationMaterial", value={"x509CertificateChain": {"certificates": []}}
    ),
    "a log entry": lambda d: edited(d, "verificationMaterial", "tlogEntries", value=[{}]),
    "an unknown field": lambda d: edited(d, "messageSignature", value={}),
    "a signature that is no text": lambda d: edited(d, ENVELOPE, "signatures", 0, "sig", value=17),
    "base64 with a line end": lambda d: edited(
        d, ENVELOPE, "payload", value=d[ENVELOPE]["payload"] + "\n"
    ),
    "base64 for the web": lambda d: edited(d, ENVELOPE, "payload", value="-_-_"),
    "text beyond ASCII": lambda d: edited(d, ENVELOPE, "payload", value="é"),
}


@pytest.mark.parametrize("edit", BUNDLES.values(), ids=BUNDLES)
def test_a_bundle_of_another_form_is_refused(case: Case, edit: Callable[[Document], Any]) -> None:
    with pytest.raises(SignatureInvalid):
        case.verify(json.dumps(edit(case.document)).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"\x00", b"\xff", b"{", b"null", b"[" * 20_000, b"9" * 9_000, b" " * MAX_BUNDLE]
)
def test_bytes_that_are_no_bundle_are_refused(case: Case, raw: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        case.verify(raw)
    with pytest.raises(SignatureInvalid):
        case.verify(case.resigned(raw))


def test_a_bundle_has_a_size_limit(case: Case) -> None:
    padded = case.bundle + b" " * (MAX_BUNDLE - len(case.bundle))
    assert case.verify(padded) == "alice"
    with pytest.raises(SignatureInvalid, match=str(MAX_BUNDLE)):
        case.verify(padded + b" ")


def test_a_key_twice_in_one_object_is_refused(case: Case) -> None:
    """Two readers could take one or the other."""
    twice = case.bundle.replace(b'"mediaType"', b'"mediaType": "x", "mediaType"', 1)
    with pytest.raises(SignatureInvalid):
        case.verify(twice)
    payload = json.dumps(case.statement).encode()
    assert case.verify(case.resigned(payload)) == "alice"
    for name in (b'"digest"', b'"algorithm"', b'"_type"', b'"resources"'):
        doubled = payload.replace(name, name + b': "x", ' + name, 1)
        with pytest.raises(SignatureInvalid):
            case.verify(case.resigned(doubled))


def test_a_payload_in_a_second_spelling_is_refused(case: Case) -> None:
    """Base64 leaves bits of a last character unused: other texts decode to the same bytes."""
    payload = json.dumps(case.statement).encode()
    payload += b" " * ((2 - len(payload)) % 3)  # two bytes are over
    document = json.loads(case.resigned(payload))
    text = document[ENVELOPE]["payload"]
    assert text.endswith("=")
    other = text[:-2] + chr(ord(text[-2]) + 1) + "="
    assert base64.b64decode(other) == payload
    with pytest.raises(SignatureInvalid, match="spelling"):
        case.verify(edited(document, ENVELOPE, "payload", value=other))


PREDICATE = "predicate"
STATEMENTS: dict[str, Callable[[Document], Any]] = {
    "another statement": lambda s: edited(s, "_type", value="https://in-toto.io/Statement/v0.1"),
    "another predicate": lambda s: edited(
        s, "predicateType", value="https://model_signing/Digests/v0.1"
    ),
    "no predicate": lambda s: edited(s, PREDICATE, value=None),
    "no subject": lambda s: edited(s, "subject", value=[]),
    "two subjects": lambda s: edited(s, "subject", value=s["subject"] * 2),
    "a subject that is not its file's": lambda s: edited(
        s, "subject", 0, "digest", "sha256", value="0" * 64
    ),
    "the file's digest as the subject's": lambda s: edited(
        s, "subject", 0, "digest", "sha256", value=s[PREDICATE]["resources"][0]["digest"]
    ),
    "a second digest": lambda s: edited(s, "subject", 0, "digest", "sha1", value="0" * 40),
    "no file": lambda s: edited(s, PREDICATE, "resources", value=[]),
    "another algorithm": lambda s: edited(
        s, PREDICATE, "resources", 0, "algorithm", value="blake2b"
    ),
    "upper case": lambda s: edited(
        s, PREDICATE, "resources", 0, "digest", value=s[PREDICATE]["resources"][0]["digest"].upper()
    ),
    "a digest and a line end": lambda s: edited(
        s, PREDICATE, "resources", 0, "digest", value=s[PREDICATE]["resources"][0]["digest"] + "\n"
    ),
    "shards": lambda s: edited(s, PREDICATE, "serialization", "method", value="shards"),
    "another hash": lambda s: edited(s, PREDICATE, "serialization", "hash_type", value="blake3"),
    "an unknown field": lambda s: edited(s, PREDICATE, "extra", value=1),
}


@pytest.mark.parametrize("edit", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_of_another_form_is_refused_even_signed(
    case: Case, edit: Callable[[Document], Any]
) -> None:
    with pytest.raises(SignatureInvalid):
        case.verify(case.resigned(json.dumps(edit(case.statement)).encode()))


def test_a_statement_on_two_files_is_refused(case: Case) -> None:
    """Whichever of them this one is: the signer vouched for a folder."""
    statement = case.statement
    resources = statement[PREDICATE]["resources"]
    resources.append({"name": "b", "algorithm": "sha256", "digest": "0" * 64})
    root = hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources))
    statement["subject"][0]["digest"]["sha256"] = root.hexdigest()
    with pytest.raises(SignatureInvalid):
        case.verify(case.resigned(json.dumps(statement).encode()))


def test_another_payload_type_is_refused_even_signed(case: Case) -> None:
    payload = json.dumps(case.statement).encode()
    with pytest.raises(SignatureInvalid):
        case.verify(case.resigned(payload, "application/json"))


@pytest.mark.parametrize("method", ["shards", "blake3"])
def test_what_the_library_signs_in_other_ways_is_refused(
    case: Case, method: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"model")
    config = hashing.Config()
    if method == "shards":
        config.use_shard_serialization(shard_size=2)
    else:
        config.use_file_serialization(hashing_algorithm="blake3")
    with pytest.raises(SignatureInvalid):
        case.verify(
            signed(tmp_path / "file", case.alice, config), hashlib.sha256(b"model").hexdigest()
        )


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_one_changed_byte_never_makes_it_somebody_else_s(case: Case, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(case.bundle) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = case.bundle[:at] + bytes([byte]) + case.bundle[at + 1 :]
    with contextlib.suppress(SignatureInvalid):
        assert case.verify(changed) == "alice"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 63), st.sampled_from("0123456789abcdefABCDEF \n"))
def test_one_changed_digit_of_the_digest_never_verifies(case: Case, at: int, digit: str) -> None:
    digest = case.digest[:at] + digit + case.digest[at + 1 :]
    if digest != case.digest:
        with pytest.raises(SignatureInvalid):
            case.verify(case.bundle, digest)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_one_changed_byte_of_what_was_signed_never_verifies(
    case: Case, data: st.DataObject
) -> None:
    document = case.document
    payload = bytearray(base64.b64decode(document[ENVELOPE]["payload"]))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    text = base64.b64encode(payload).decode()
    with pytest.raises(SignatureInvalid):
        case.verify(edited(document, ENVELOPE, "payload", value=text))


def test_verifying_takes_milliseconds(case: Case) -> None:
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        case.verify(case.bundle)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[10] < 0.004


VECTORS = os.environ.get("MODEL_SIGNING_CONFORMANCE")


@pytest.mark.skipif(not VECTORS, reason="MODEL_SIGNING_CONFORMANCE names no clone of the vectors")
def test_the_published_vectors() -> None:
    """The cases with keys of the conformance suite (sampras343/model-signing-conformance on GitHub,
    which has no licence: no copy stands here). Each file of a case is taken for the signed one;
    only where it is the model's only one may the bundle verify."""
    root = Path(VECTORS or "") / "test"
    verdicts: dict[str, bool] = {}
    for path in sorted((root / "test-cases" / "verify").rglob("config.json")):
        config = json.loads(path.read_text())
        pem = root / "assets" / config["verify"].get("public_key", "")
        if config["method"] != "key" or not pem.is_file():
            continue
        base = path.parent if config.get("model_relative_to") == "test_dir" else root / "assets"
        model = base / config["model"]
        key = serialization.load_pem_public_key(pem.read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        for file in [model] if model.is_file() else filter(Path.is_file, model.rglob("*")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = f"{path.parent.name}: {file.name}"
            try:
                verify((path.parent / "bundle.sig").read_bytes(), digest, {"": key})
                verdicts[name] = True
            except SignatureInvalid:
                verdicts[name] = False
    # Those of one file before model-signing 1.1 do not say by which key they are.
    assert [name for name in verdicts if verdicts[name]] == ["key-single-file: model.bin"]
    assert len(verdicts) > 40
