"""Debian packages, unpacked without installing them: `apt-get download`, `dpkg-deb -x`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from awareness_demo.commands import error_line, run
from awareness_vllm.errors import BadInput


def unpack(package: str, scratch: Path) -> Path:
    """Download a Debian package into `scratch` and unpack it there.

    Returns:
        The folder that holds the package's tree.

    Raises:
        BadInput: not a Debian system, no such package, or no network.
    """
    try:
        _download(package, scratch)
        deb = next(scratch.glob("*.deb"))
        tree = scratch / "tree"
        run(["dpkg-deb", "-x", str(deb), str(tree)], scratch)
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise BadInput(
            f"cannot get the Debian package {package}",
            found=error_line(error),
            expected="apt-get and dpkg-deb, with the package in apt's lists",
            remedy="run `apt-get update` as root and `make anchors` again, or give texts of your "
            "own with --anchors",
        ) from error
    deb.unlink()
    return tree


def _download(package: str, scratch: Path) -> None:
    # Apt's own sandbox user cannot write into our folder and would only warn about it.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
    try:
        run(command, scratch)
    except subprocess.CalledProcessError:
        if os.geteuid() != 0:
            raise
        # Fresh containers come with empty package lists.
        run(["apt-get", "-q", "update"], scratch)
        run(command, scratch)
