"""`awareness sign`: sign a memory package, a W-Matrix or its certificate."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_what

if TYPE_CHECKING:
    from awareness_vllm.trust.policy import Role

HELP = "sign a memory package, a W-Matrix or its certificate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="private key (`awareness keygen`)"
    )
    parser.add_argument(
        "--certificate",
        action="store_true",
        help="sign a W-Matrix's certificate, as who measured it, instead of the file",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.cli.verify import check
    from awareness_vllm.errors import BadInput
    from awareness_vllm.trust.policy import signature_path
    from awareness_vllm.trust.signing import sign

    checked = check(args.what, args.store)
    role: Role = checked.kind
    if not args.certificate:
        signature = signature_path(checked.path, role)
        fingerprint = sign(checked.path, checked.digest, args.key, signature)
        return signed(checked.path, role, signature, fingerprint)
    if checked.statement is None:
        raise BadInput(
            "there is no certificate to sign",
            found=str(checked.path),
            expected="a certified W-Matrix",
            remedy="`awareness certify` measures one",
        )
    signature = signature_path(checked.path, "certificate")
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "certificate.json"
        document.write_bytes(checked.statement)
        fingerprint = sign(document, checked.statement_digest, args.key, signature)
    return signed(checked.path, "certificate", signature, fingerprint)


def signed(path: Path, role: Role, signature: Path, fingerprint: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "role": role,
        "signature": str(signature),
        "fingerprint": fingerprint,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['signature']}  by {result['fingerprint']}, as {result['role']}")
