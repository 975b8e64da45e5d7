"""Making keys, and signing with them: for who publishes files, not for a server."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from awareness_vllm.errors import BadInput, NotAvailable
from awareness_vllm.files import atomic_write, write_new
from awareness_vllm.trust.bundle import HASHES, fingerprint, verify

INSTALL = "pip install 'awareness-vllm[sign]'"


@dataclass(frozen=True)
class KeyPair:
    """The files of a new key, and its fingerprint."""

    private: Path
    public: Path
    fingerprint: str


def keygen(name: Path) -> KeyPair:
    """A new EC key (P-256): `NAME.key`, for its owner alone, and `NAME.pub`.

    Raises:
        BadInput: one of the files is there already; neither is touched.
        OSError: the folder cannot be written to.
    """
    private, public = (name.with_name(name.name + suffix) for suffix in (".key", ".pub"))
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(public, pem, 0o644)
    try:
        _write_new(private, secret, stat.S_IRUSR | stat.S_IWUSR)
    except BaseException:
        public.unlink()
        raise
    return KeyPair(private, public, fingerprint(key.public_key()))


def sign(path: Path, digest: str, key: Path, signature: Path) -> str:
    """Sign a file, in place of an earlier signature; the fingerprint of the key.

    The signature is verified before it is published, as a server verifies it.

    Args:
        digest: sha256, in hex, of the file's bytes as they were checked.
        key: the file of a private key, in PEM, without a password.

    Raises:
        BadInput: a key or a file that cannot be used.
        NotAvailable: the library is not installed.
        SignatureInvalid: the file was altered meanwhile.
    """
    public = _private_key(key).public_key()
    config = _library().Config().use_elliptic_key_signer(private_key=key)
    with atomic_write(signature) as draft:
        try:
            config.sign(path.resolve(), draft)
        except ValueError as error:
            raise BadInput(f"{path} cannot be signed", found=str(error)) from error
        verify(draft.read_bytes(), digest, {"": public})
    return fingerprint(public)


def _library() -> ModuleType:
    try:
        from model_signing import signing
    except ImportError as error:
        raise NotAvailable(
            "signing needs the library of OpenSSF Model Signing",
            found=str(error),
            expected="model-signing 1.1.1 and pyOpenSSL (verifying needs neither)",
            remedy=INSTALL,
        ) from error
    return signing


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    expected = "a private EC key in PEM without a password, as `awareness keygen` writes it"
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(
            f"the key {path} cannot be used", found=str(error)[:200], expected=expected
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in HASHES:
        found = type(key).__name__
        raise BadInput(f"the key {path} cannot be used", found=found, expected=expected)
    return key


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a whole file that was not there before. Raises BadInput."""
    try:
        write_new(path, content, mode)
    except FileExistsError as error:
        raise BadInput(
            "a key is never overwritten",
            found=f"{path}, which exists",
            expected="a new name",
            remedy="choose another name, or move the old key away",
        ) from error
