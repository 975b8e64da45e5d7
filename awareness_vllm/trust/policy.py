"""The trust policy: whose signatures count, for which kind of file (`--trust FILE`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import Field

from awareness_vllm.errors import BadInput, SignatureInvalid, escaped
from awareness_vllm.schema import FrozenModel
from awareness_vllm.tensor_file import FileRefused, opened, parse_document
from awareness_vllm.trust.bundle import (
    HASHES,
    MAX_BUNDLE,
    fingerprint,
    invalid_signature,
    parse_bundle,
    verify_bundle,
)

Role = Literal["package", "wmatrix", "certificate"]
MAX_TRUST = 1 << 20
"""Bytes of a trust file, and of a key's file."""
BEGIN = "-----BEGIN"


class KeyEntry(FrozenModel):
    """A key in a trust file: `public_key` is its PEM, or the path of its PEM file, relative to the
    trust file; it may sign files of these `roles`."""

    public_key: str = Field(min_length=1)
    roles: tuple[Role, ...] = Field(min_length=1)


class TrustFile(FrozenModel):
    """The JSON document of `--trust`: keys by the name of who signs with them. Without any key,
    nothing is trusted."""

    keys: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_.@+-]{1,64}$")], KeyEntry]


@dataclass(frozen=True)
class TrustedKey:
    """A public key, and what files its signature counts for."""

    name: str
    key: ec.EllipticCurvePublicKey
    roles: frozenset[Role]


@dataclass(frozen=True)
class Signature:
    """Who signed a file: the name of a trusted key, or None and the `reason`."""

    signer: str | None
    reason: str = ""


class Signers(FrozenModel):
    """The names of the trusted keys that signed what a memory is made of; None: nobody's."""

    package: str | None = None
    wmatrix: str | None = None
    certificate: str | None = None


@dataclass(frozen=True)
class TrustPolicy:
    """The keys that are trusted, by fingerprint. A policy without a `path`, the default, is none:
    signatures are not looked at, and nobody has signed anything.

    A file is unsigned without a signature beside it, and with one by a key that the policy does not
    have or not in this role: anyone can make such a signature, so it says as much as none. A
    signature that cannot be read, or that a trusted key did not make of this file, is an error
    wherever the file is used: something was altered, or belongs to another version of the file.
    """

    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def read(cls, path: Path | None) -> TrustPolicy:
        """The policy of a trust file; without a file, none.

        Raises:
            BadInput: a trust file or a key that cannot be used.
        """
        if path is None:
            return cls()
        try:
            document = parse_document(TrustFile, _read_own(path), "trust file")
        except (FileRefused, OSError) as error:
            raise _unusable(path, str(error)) from error
        keys: dict[str, TrustedKey] = {}
        for name, entry in document.keys.items():
            key = _public_key(path, name, entry.public_key)
            other = keys.setdefault(fingerprint(key), TrustedKey(name, key, frozenset(entry.roles)))
            if other.name != name:
                raise _unusable(path, f"the same key for {other.name} and {name}", "one name each")
        return cls(keys, path)

    def __bool__(self) -> bool:
        """Whether there is a trust file."""
        return self.path is not None

    def signer(self, path: Path, digest: str, role: Role) -> str | None:
        """The name of the trusted key that signed a file; None where it is unsigned.

        Args:
            path: the file's; its signature is at `signature_path(path, role)`.
            digest: sha256, in hex, of the bytes that are used: the file's as they were read, or of
                the statement that stands for it. Its first half, which is a package's ID, tells
                whose signature the ID has, before anything is read.

        Raises:
            SignatureInvalid: the signature cannot be read, or a trusted key did not make it of
                these bytes.
        """
        return self.signature(path, digest, role).signer

    def require(self, path: Path, digest: str, role: Role) -> str:
        """The name of the trusted key that signed a file.

        Raises:
            SignatureInvalid: as `signer` does, and for an unsigned file.
        """
        signature = self.signature(path, digest, role)
        if signature.signer is None:
            raise SignatureInvalid(
                f"{escaped(path.name)} is not signed by a trusted key",
                found=signature.reason,
                expected=f"a signature of a key with the role {role!r} in the trust file",
                remedy="sign it with `awareness sign`, or add the signer's key to the trust file",
            )
        return signature.signer

    def signature(self, path: Path, digest: str, role: Role) -> Signature:
        """Who signed a file, or why it is unsigned. Arguments and errors as of `signer`."""
        if not self:
            return Signature(None, "no trust file")
        file = signature_path(path, role)
        if (document := read_signature(path, role)) is None:
            return Signature(None, f"no {file.name}")
        bundle = parse_bundle(document, file.name)
        trusted = self.keys.get(bundle.fingerprint)
        if trusted is None:
            return Signature(None, f"signed by an unknown key ({bundle.fingerprint})")
        verify_bundle(bundle, trusted.key, digest, file.name)
        if role not in trusted.roles:
            return Signature(None, f"signed by {trusted.name}, whose key has not the role {role!r}")
        return Signature(trusted.name)


def read_signature(path: Path, role: Role) -> bytes | None:
    """The signature of a file in a role, not looked at; None where there is none.

    Raises:
        SignatureInvalid: it cannot be read.
    """
    file = signature_path(path, role)
    try:
        # The operator names W-Matrices, and may link to them; packages lie in tenants' stores.
        return (_read if role == "package" else _read_own)(file, MAX_BUNDLE)
    except FileNotFoundError:
        return None
    except FileRefused as error:
        raise invalid_signature(file.name, error.found) from error


def signature_path(path: Path, role: Role) -> Path:
    """The file of a signature, beside the signed one: `X.sig`, a certificate's
    `X.certificate.sig`."""
    suffix = ".certificate.sig" if role == "certificate" else ".sig"
    return path.with_name(path.name + suffix)


def _read(path: Path, limit: int) -> bytes:
    """A small file: regular, no link. Raises FileRefused, FileNotFoundError."""
    try:
        with opened(path, limit=limit) as (file, size):
            # One byte more, should the file have grown meanwhile.
            document = file.read(limit + 1)
    except FileRefused as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from error
        raise
    except OSError as error:
        raise FileRefused(f"not readable ({error})") from error
    if len(document) != size:
        raise FileRefused("a file that changes while it is read")
    return document


def _read_own(path: Path, limit: int = MAX_TRUST) -> bytes:
    """A file of the operator's, whose links are followed. Raises FileRefused, FileNotFoundError."""
    return _read(Path(os.path.realpath(path)), limit)


def _public_key(trust: Path, name: str, text: str) -> ec.EllipticCurvePublicKey:
    """The key of an entry. Raises BadInput."""
    if text.lstrip().startswith(BEGIN):
        pem = text.encode()
    else:
        try:
            pem = _read_own(trust.parent / text)
        except (OSError, ValueError, FileRefused) as error:
            raise _unusable(trust, f"key {name}: {text[:200]!r} ({error})", "a PEM file") from error
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(trust, f"key {name}: no public key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in HASHES:
        raise _unusable(trust, f"key {name}: {type(key).__name__}", "an EC key on a NIST curve")
    return key


def _unusable(path: Path, found: str, expected: str | None = None) -> BadInput:
    return BadInput(
        f"the trust file {path} cannot be used",
        found=found,
        expected=expected or '{"keys": {"NAME": {"public_key": "NAME.pub", "roles": ["package"]}}}',
        remedy="see docs/commands.md; `awareness keygen` makes keys",
    )
