"""W-Matrix files at hand, read as far as their manifests: which leads from where to where."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import NoWMatrix, WMatrixCorrupt
from awareness_vllm.files import file_digest, wmatrices_dir
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.manifest import WMatrixManifest, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WMatrixEntry:
    """A W-Matrix file; by its `digest` aligned memories and cache salts are keyed."""

    path: Path
    manifest: WMatrixManifest
    digest: str

    @classmethod
    def read(cls, path: Path) -> WMatrixEntry:
        """Raises WMatrixCorrupt."""
        return cls(path, read_manifest(path), file_digest(path))

    @functools.cached_property
    def certificate(self) -> Certificate | None:
        """None where nobody measured the map; an older version's certificate is none either."""
        found = self.manifest.measured
        if found is None and self.manifest.certificate is not None:
            logger.warning("%s: its certificate is an older version's: certify it again", self)
        return found

    def __str__(self) -> str:
        return f"{self.manifest.source.name} → {self.manifest.target.name} ({self.path.name})"


def entries(paths: Iterable[str | Path] | None = None) -> list[WMatrixEntry]:
    """The W-Matrices of files and folders, by default of `$AWARENESS_HOME/wmatrices` (which need
    not be there yet).

    Raises:
        WMatrixCorrupt: a file that was named itself; in a folder, those of another version of the
            format are passed over.
    """
    found: list[WMatrixEntry] = []
    if paths is None:  # a new home has no such folder yet
        paths = [wmatrices_dir()] if wmatrices_dir().is_dir() else []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(WMatrixEntry.read(path))
            continue
        for file in sorted(path.glob("*.wmatrix")):
            try:
                found.append(WMatrixEntry.read(file))
            except WMatrixCorrupt:
                continue
    return found


def ends(registry: Iterable[WMatrixEntry]) -> list[Geometry]:
    """The models that W-Matrices lead from and to, each once."""
    found: list[Geometry] = []
    for entry in registry:
        for end in (entry.manifest.source, entry.manifest.target):
            if not any(end.same_model(other) for other in found):
                found.append(end)
    return found


def best(registry: Iterable[WMatrixEntry]) -> WMatrixEntry:
    """The one that was measured to keep most; any where none was measured."""
    return max(registry, key=lambda e: e.certificate.retention.mean if e.certificate else -1.0)


def leading(
    registry: Sequence[WMatrixEntry], source: Geometry, target: Geometry, *, text: bool = True
) -> WMatrixEntry:
    """The W-Matrix from one model to another, the best certified one of several.

    Args:
        text: whether the packages have their text; those without need a map that reads none.

    Raises:
        NoWMatrix: there is none; what there is is named.
    """
    fit = [
        e
        for e in registry
        if e.manifest.source.same_model(source)
        and e.manifest.target.same_model(target)
        and (text or not e.manifest.reads_tokens)
    ]
    if fit:
        return best(fit)
    raise NoWMatrix(
        f"no W-Matrix leads from {source.name} to {target.name}",
        found="; ".join(map(str, registry)) or "no W-Matrix at all",
        expected="one for these exact weights" + ("" if text else " that reads no text"),
        remedy="fit one with `awareness fit`, or look for a way through other models with "
        "`awareness path`",
    )
