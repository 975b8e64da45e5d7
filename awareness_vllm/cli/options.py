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
