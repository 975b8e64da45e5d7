"""The compatibility matrix: measured retention of every pair with a W-Matrix, beside priors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from awareness_vllm.compatibility.report import Basis, BasisKind, Cell, Matrix
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry


def matrix(
    paths: Sequence[Path] | None = None,
    *,
    priors: Iterable[Cell] = (),
    trust: TrustPolicy | None = None,
) -> Matrix:
    """A cell for every pair that a W-Matrix joins, then the published ones.

    Args:
        paths: W-Matrix files and folders of them, by default `$AWARENESS_HOME/wmatrices`.
        priors: published cells.
        trust: whose signatures count.

    Raises:
        WMatrixCorrupt, SignatureInvalid: a file in `paths` cannot be used (in a folder it is passed
            over).
    """
    return of_registry(Registry.read(paths, trust), priors)


def of_registry(registry: Registry, priors: Iterable[Cell] = ()) -> Matrix:
    """`matrix` of W-Matrices whose manifests have been read."""
    names = names_of(g for e in registry for g in (e.manifest.source, e.manifest.target))
    pairs: defaultdict[tuple[str, str], list[WMatrixEntry]] = defaultdict(list)
    for entry in registry:
        ends = (entry.manifest.source, entry.manifest.target)
        pairs[names[ends[0].fingerprint], names[ends[1].fingerprint]].append(entry)
    cells = [*(cell(*pair, shown(joining)) for pair, joining in pairs.items()), *priors]
    # One order for both sides: a model's own cell lies on the diagonal.
    models = dict.fromkeys(name for c in cells for name in (c.source, c.target))
    sources, targets = {c.source for c in cells}, {c.target for c in cells}
    return Matrix(
        sources=tuple(name for name in models if name in sources),
        targets=tuple(name for name in models if name in targets),
        cells=tuple(cells),
    )


def shown(entries: Iterable[WMatrixEntry]) -> WMatrixEntry:
    """The map of a pair that the matrix shows: the first that is certified, else the first that
    claims to be, else the first."""
    return min(entries, key=lambda entry: (entry.certificate is None, entry.claimed))


def cell(source: str, target: str, entry: WMatrixEntry) -> Cell:
    """The certified retention of one W-Matrix, of its map alone; empty without a certificate."""
    if (certificate := entry.certificate) is None:
        return Cell(source=source, target=target, retention=None, basis=None)
    protocol = f"{certificate.counts['texts']} texts of {certificate.protocol.context} tokens"
    origin = f"{entry.path.name}: {protocol}, {certificate.measured}"
    kind: BasisKind = "claimed" if entry.claimed else "measured"
    basis = Basis(kind=kind, source=origin, digest=entry.digest)
    return Cell(
        source=source,
        target=target,
        retention=certificate.retention,
        basis=basis,
        signed_by=entry.certificate_signed_by,
    )


def names_of(models: Iterable[Geometry]) -> dict[str, str]:
    """A name for each model, by fingerprint; models that share a name have it appended."""
    names: dict[str, str] = {}
    for model in models:
        names.setdefault(model.fingerprint, model.name)
    shared = list(names.values())
    return {
        mark: name if shared.count(name) == 1 else f"{name} ({mark[:8]})"
        for mark, name in names.items()
    }
