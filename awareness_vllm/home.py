"""Where models, packages and W-Matrices live on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$AWARENESS_HOME`, by default `~/.cache/awareness`."""
    return Path(os.environ.get("AWARENESS_HOME") or Path.home() / ".cache" / "awareness")


def models_dir() -> Path:
    return home() / "models"


def wmatrices_dir() -> Path:
    return home() / "wmatrices"


def geometries_dir() -> Path:
    return home() / "geometries"


def anchors_dir() -> Path:
    return home() / "anchors"


def default_store() -> Path:
    return home() / "store"
