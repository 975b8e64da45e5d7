"""Signatures of one file with an EC key: bundles of OpenSSF Model Signing (model-signing 1.1.1).

A bundle is a Sigstore bundle with a DSSE envelope around an in-toto statement; the statement has
the sha256 of the signed files. The library that makes them needs 30 packages; a server verifies
them over `cryptography` alone, and only those of one whole file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from awareness_vllm.errors import SignatureInvalid, escaped
from awareness_vllm.schema import FrozenModel
from awareness_vllm.tensor_file import FileRefused, parse_document

MAX_BUNDLE = 32 << 10
"""Bytes of a bundle: twenty times that of one file."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
SHORTEST = 32
"""Digits of a digest that name a file: those of a package's ID."""
HASHES = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
"""The digest that is signed, by the name of the key's curve."""

Hex = Field(pattern=r"^[0-9a-f]{64}$")


class _Camel(FrozenModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _PublicKey(_Camel):
    hint: str = Hex


class _Material(_Camel):
    public_key: _PublicKey
    tlog_entries: list[Any] = Field([], max_length=0)


class _EnvelopeSignature(_Camel):
    sig: str
    keyid: Literal[""] | None = None


class _Envelope(_Camel):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: list[_EnvelopeSignature] = Field(min_length=1, max_length=1)


class _SigstoreBundle(_Camel):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _Material
    dsse_envelope: _Envelope


class _Digest(FrozenModel):
    sha256: str = Hex


class _Subject(FrozenModel):
    name: str
    digest: _Digest


class _Resource(FrozenModel):
    name: str
    algorithm: Literal["sha256"]
    digest: str = Hex


class _Serialization(FrozenModel):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool
    ignore_paths: list[str] | None = None


class _Predicate(FrozenModel):
    serialization: _Serialization
    resources: list[_Resource] = Field(min_length=1, max_length=1)


class _Statement(FrozenModel):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[_Subject] = Field(min_length=1, max_length=1)
    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: _Predicate


Document = TypeVar("Document", bound=FrozenModel)


@dataclass(frozen=True)
class Bundle:
    """A signature as its file has it, not verified yet: the `fingerprint` of the key that is said
    to have made it, the bytes that it signs, and the sha256 of the file that these bytes are
    about."""

    fingerprint: str
    signature: bytes
    payload: bytes
    digest: str


def parse_bundle(document: bytes, name: str) -> Bundle:
    """A bundle about one whole file.

    Args:
        name: of the signature's file, for messages.

    Raises:
        SignatureInvalid: anything that model-signing 1.1.1 would not write for one file and a key.
    """
    if len(document) > MAX_BUNDLE:
        raise invalid_signature(name, f"{len(document)} bytes", f"at most {MAX_BUNDLE}")
    bundle = _parse(document, _SigstoreBundle, name)
    envelope = bundle.dsse_envelope
    payload = _decode(envelope.payload, name)
    statement = _parse(payload, _Statement, name)
    (subject,), (resource,) = statement.subject, statement.predicate.resources
    # A subject's digest is that of its resources' digests, one after another.
    root = hashlib.sha256(bytes.fromhex(resource.digest)).hexdigest()
    if subject.digest.sha256 != root:
        raise invalid_signature(name, f"a subject {subject.digest.sha256}", f"{root}, its file's")
    return Bundle(
        bundle.verification_material.public_key.hint,
        _decode(envelope.signatures[0].sig, name),
        payload,
        resource.digest,
    )


def verify_bundle(
    bundle: Bundle, key: ec.EllipticCurvePublicKey, digest: str, name: str = "a signature"
) -> None:
    """Check that a key made the signature of a file with this sha256, in hex, or a sha256 that
    begins so.

    Raises:
        SignatureInvalid: another file's, another key's, or an altered one.
    """
    if len(digest) < SHORTEST or not bundle.digest.startswith(digest):
        raise invalid_signature(
            name, f"the signature of a file with sha256 {bundle.digest}", f"sha256 {digest}"
        )
    pae = b"DSSEv1 %d %s %d %s" % (
        len(PAYLOAD_TYPE),
        PAYLOAD_TYPE.encode(),
        len(bundle.payload),
        bundle.payload,
    )
    try:
        key.verify(bundle.signature, pae, ec.ECDSA(HASHES[key.curve.name]))
    except InvalidSignature as error:
        raise invalid_signature(
            name, "a signature that its key did not make of these bytes", "an unaltered one"
        ) from error


def verify(document: bytes, digest: str, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> str:
    """The name of the key that signed a file with this sha256, in hex.

    Raises:
        SignatureInvalid: none of these keys did.
    """
    bundle = parse_bundle(document, "a signature")
    for name, key in keys.items():
        if fingerprint(key) == bundle.fingerprint:
            verify_bundle(bundle, key, digest)
            return name
    raise invalid_signature("a signature", f"key {bundle.fingerprint}", "one of these keys")


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """sha256, in hex, of a public key in PEM: the hint of its bundles."""
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def invalid_signature(
    name: str, found: str, expected: str = "a bundle as `awareness sign` writes it"
) -> SignatureInvalid:
    """The error about a signature that proves nothing."""
    return SignatureInvalid(
        f"{escaped(name)} cannot be trusted",
        found=found,
        expected=expected,
        remedy="get file and signature anew from where they came, or remove the signature",
    )


def _parse(document: bytes, model: type[Document], name: str) -> Document:
    try:
        return parse_document(model, document, "bundle")
    except FileRefused as error:
        raise invalid_signature(name, error.found) from error


def _decode(text: str, name: str) -> bytes:
    """The bytes of canonical base64."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid_signature(name, "no base64") from error
    if base64.b64encode(raw).decode() != text:
        raise invalid_signature(name, "base64 in a second spelling of the same bytes")
    return raw
