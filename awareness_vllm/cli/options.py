"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_wmatrices(parser: argparse.ArgumentParser) -> None:
    """Which W-Matrices to look at: `args.wmatrix`, None for the default folder."""
    parser.add_argument(
        "--wmatrix",
        nargs="+",
        action="extend",
        type=Path,
        metavar="PATH",
        help="files, or folders of them (default: $AWARENESS_HOME/wmatrices)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where models compute: `args.device`."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "auto"),
        default="cpu",
        help="device that the models compute on (auto: cuda where there is one; default: cpu)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Whose signatures count: `args.trust`, None without a trust file."""
    parser.add_argument(
        "--trust", type=Path, metavar="FILE", help="trust file: say which of its keys signed what"
    )


def add_registry(parser: argparse.ArgumentParser, *aliases: str) -> None:
    """Which registry to look at: `args.registry`, None for the default one."""
    parser.add_argument(
        "--registry",
        *aliases,
        metavar="REF",
        help="oci://HOST/REPOSITORY or a folder (default: $AWARENESS_REGISTRY, or the folder "
        "$AWARENESS_HOME/registry)",
    )


def add_what(parser: argparse.ArgumentParser) -> None:
    """A package or a W-Matrix: `args.what`, looked up in `args.store` where it is an ID."""
    parser.add_argument("what", metavar="ID|FILE", help="a memory's ID, or a file")
    parser.add_argument("--store", type=Path, help="folder in which the ID is looked up")
