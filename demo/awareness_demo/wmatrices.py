"""The maps of the demo pair that the repository ships, put in place at home.

`python -m awareness_demo.wmatrices` links both directions into `$AWARENESS_HOME/wmatrices`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from awareness_demo.models import prepare
from awareness_vllm.errors import WMatrixCorrupt
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.wmatrix.manifest import read_manifest

MAPS = Path(__file__).resolve().parents[2] / "maps"


def is_readable(path: Path) -> bool:
    """Whether a file is a W-Matrix of a format that this version reads."""
    try:
        read_manifest(path)
    except WMatrixCorrupt:
        return False
    return True


def shipped(source: Path, target: Path, maps: Path = MAPS) -> Path | None:
    """The repository's map between two prepared models; None where there is none for exactly these
    weights and tokenizers."""
    path = maps / name_of(source, target)
    if not is_readable(path):
        return None
    manifest = read_manifest(path)
    fits = manifest.source.same_model(geometry_of(source)) and manifest.target.same_model(
        geometry_of(target)
    )
    return path if fits else None


def provide(source: Path, target: Path, maps: Path = MAPS) -> Path | None:
    """The map at home between two prepared models: one that is there, or else a link to the shipped
    one; None without either."""
    path = wmatrices_dir() / name_of(source, target)
    if not is_readable(path):
        if (ours := shipped(source, target, maps)) is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(ours)
    return path


def name_of(source: Path, target: Path) -> str:
    return f"{source.name}--{target.name}.wmatrix"


if __name__ == "__main__":
    smollm2, gemma3 = prepare(progress=lambda line: None).values()
    for pair in ((smollm2, gemma3), (gemma3, smollm2)):
        print(provide(*pair) or f"{name_of(*pair)}: not shipped", file=sys.stderr)
