"""`awareness verify`: check that a memory package or a W-Matrix is whole and unaltered, and with a
trust file who signed it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from awareness_vllm.cli.options import add_what

HELP = "check that a memory package or a W-Matrix is whole and unaltered, and who signed it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)
    parser.add_argument(
        "--trust", type=Path, metavar="FILE", help="trust file: an unsigned file fails"
    )


@dataclass(frozen=True)
class Checked:
    """A file whose content is whole: its sha256, and what a certificate's signature is about."""

    path: Path
    kind: Literal["package", "wmatrix"]
    digest: str
    statement: bytes | None = None

    @property
    def statement_digest(self) -> str:
        """sha256, in hex, of the statement, which there is."""
        import hashlib

        assert self.statement is not None
        return hashlib.sha256(self.statement).hexdigest()


def check(what: str, store: Path | None) -> Checked:
    """A whole file, by its path or a memory's ID. Raises PackageCorrupt, WMatrixCorrupt."""
    from awareness_vllm.packages.file import read_index, verify
    from awareness_vllm.packages.manifest import MEMORY_ID
    from awareness_vllm.packages.store import digest_in, locate
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.manifest import read_digest

    path = locate(what, store)
    if path.suffix == ".wmatrix":
        digest = read_digest(path)[1]
        statement = load(path, digest=digest).manifest.certificate_statement
        return Checked(path, "wmatrix", digest, statement)
    named = MEMORY_ID.fullmatch(path.stem)
    digest = read_index(path, digest=digest_in(path.stem) if named else None).digest
    verify(path)
    return Checked(path, "package", digest)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.packages.manifest import id_of
    from awareness_vllm.trust.policy import TrustPolicy

    trust = TrustPolicy.read(args.trust)
    checked = check(args.what, args.store)
    result: dict[str, Any] = {"ok": True, "path": str(checked.path), "digest": checked.digest}
    if checked.kind == "package":
        result |= {"kind": "memory", "id": id_of(checked.digest)}
    else:
        result |= {"kind": "wmatrix"}
    if not trust:
        return result
    result["signed_by"] = trust.require(checked.path, checked.digest, checked.kind)
    if checked.statement is not None:
        digest = checked.statement_digest
        result["certificate_signed_by"] = trust.signer(checked.path, digest, "certificate")
    return result


def show(result: dict[str, Any]) -> None:
    print(f"ok  {result.get('id') or result['digest']}  {result['path']}")
    if "signed_by" in result:
        print(f"signed by {result['signed_by']}")
    if "certificate_signed_by" in result:
        print(
            f"certificate signed by {result['certificate_signed_by'] or 'nobody trusted: claimed'}"
        )
