"""`awareness keygen`: a key to sign packages, W-Matrices and certificates with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make a key to sign packages, W-Matrices and certificates with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", type=Path, metavar="NAME", help="writes NAME.key (keep it private) and NAME.pub"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.trust.signing import keygen

    pair = keygen(args.name)
    return {
        "private_key": str(pair.private),
        "public_key": str(pair.public),
        "fingerprint": pair.fingerprint,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['private_key']}  private: whoever has it can sign")
    print(f"{result['public_key']}  for trust files; fingerprint {result['fingerprint']}")
