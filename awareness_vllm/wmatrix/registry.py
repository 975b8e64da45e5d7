"""The W-Matrix files at hand, read as far as their manifests: which leads from where to where."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
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
    """A W-Matrix file; aligned memories and cache salts are keyed by its `digest`."""

    path: Path
    manifest: WMatrixManifest
    digest: str

    @classmethod
    def read(cls, path: Path) -> WMatrixEntry:
        """Raises WMatrixCorrupt."""
        return cls(path, read_manifest(path), file_digest(path))

    @functools.cached_property
    def certificate(self) -> Certificate | None:
        """None where the map was never measured, or by an older version only."""
        measured = self.manifest.measured
        if measured is None and self.manifest.certificate is not None:
            logger.warning("%s: its certificate is an older version's: certify it again", self)
        return measured

    def leads(self, source: Geometry, target: Geometry) -> bool:
        """Whether the map is one from these exact weights to those."""
        return self.manifest.source.same_model(source) and self.manifest.target.same_model(target)

    def __str__(self) -> str:
        return f"{self.manifest.source.name} → {self.manifest.target.name} ({self.path.name})"


@dataclass(frozen=True)
class Registry:
    """The W-Matrices that a server, a check or a router chooses from."""

    entries: tuple[WMatrixEntry, ...] = ()

    @classmethod
    def read(cls, paths: Registry | Iterable[str | Path] | None = None) -> Registry:
        """The W-Matrices of files and folders, by default of `$AWARENESS_HOME/wmatrices`, which
        need not exist; a registry as it is.

        Raises:
            WMatrixCorrupt: a file that was named itself; in a folder, files that this version does
                not read are passed over.
        """
        if isinstance(paths, Registry):
            return paths
        entries: list[WMatrixEntry] = []
        if paths is None:
            paths = [wmatrices_dir()] if wmatrices_dir().is_dir() else []
        for path in map(Path, paths):
            if not path.is_dir():
                entries.append(WMatrixEntry.read(path))
                continue
            for file in sorted(path.glob("*.wmatrix")):
                try:
                    entries.append(WMatrixEntry.read(file))
                except WMatrixCorrupt:
                    continue
        return cls(tuple(entries))

    def __iter__(self) -> Iterator[WMatrixEntry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "; ".join(map(str, self.entries)) or "no W-Matrix at all"

    def usable(self, has_text: bool) -> Registry:
        """The maps for packages with their text, which read its tokens, or for those without."""
        return Registry(tuple(e for e in self.entries if e.manifest.reads_tokens == has_text))

    def certified(self) -> Registry:
        """The maps that were measured."""
        return Registry(tuple(e for e in self.entries if e.certificate))

    def find(self, source: Geometry, target: Geometry, has_text: bool) -> WMatrixEntry:
        """The map that serves memories of one model on another: of several the one that was
        measured to keep most.

        Raises:
            NoWMatrix: there is none; the maps at hand are named.
        """
        matches = [entry for entry in self.usable(has_text) if entry.leads(source, target)]
        if matches:
            return best(matches)
        from_source = [e for e in self.entries if e.manifest.source.same_model(source)]
        raise NoWMatrix(
            f"no W-Matrix leads from {source.name} to {target.name}",
            found=Registry(tuple(from_source)) if from_source else self,
            expected="one for these exact weights"
            + ("" if has_text else " that reads no text (`awareness fit --without-text`)"),
            remedy="fit one with `awareness fit` and give it with --wmatrix FILE, or look for a "
            "route through other models with `awareness path`",
        )

    def models(self) -> list[Geometry]:
        """The models that maps lead from and to, each once."""
        models: list[Geometry] = []
        for entry in self.entries:
            for model in (entry.manifest.source, entry.manifest.target):
                if not any(model.same_model(other) for other in models):
                    models.append(model)
        return models


def best(entries: Iterable[WMatrixEntry]) -> WMatrixEntry:
    """The map that was measured to keep most; any where none was measured."""
    return max(entries, key=lambda e: e.certificate.retention.mean if e.certificate else -1.0)
