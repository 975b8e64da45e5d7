"""Commands of package registries, and the errors that they print."""

from __future__ import annotations

import subprocess
from pathlib import Path

TIMEOUT = 600


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder, its output captured for the error."""
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def error_line(error: Exception) -> str:
    """The last line that a failed command printed, or else the error's own."""
    output = getattr(error, "stderr", None) or str(error) or type(error).__name__
    lines = output.strip().splitlines()
    return (lines[-1] if lines else "no output")[:200]
