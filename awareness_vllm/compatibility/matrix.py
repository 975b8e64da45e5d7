"""The compatibility matrix: what the W-Matrices at hand were measured to keep, beside priors."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from awareness_vllm.compatibility.report import Basis, Cell, Matrix
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry, best


def matrix(paths: Sequence[Path] | None = None, *, priors: Iterable[Cell] = ()) -> Matrix:
    """Every pair that a W-Matrix joins, and the published cells that are given.

    Args:
        paths: W-Matrix files and folders of them, by default `$AWARENESS_HOME/wmatrices`.
        priors: cells that somebody else published.

    Raises:
        WMatrixCorrupt: a file that was named itself.
    """
    return of_shelf(Registry.read(paths), priors)


def of_shelf(registry: Registry, priors: Iterable[Cell] = ()) -> Matrix:
    """`matrix` of W-Matrices that have been read."""
    names = names_of(g for e in registry for g in (e.manifest.source, e.manifest.target))
    pairs: defaultdict[tuple[str, str], list[WMatrixEntry]] = defaultdict(list)
    for entry in registry:
        ends = (entry.manifest.source, entry.manifest.target)
        pairs[names[fingerprint(ends[0])], names[fingerprint(ends[1])]].append(entry)
    cells = [*(cell(*pair, best(found)) for pair, found in pairs.items()), *priors]
    # One order for both sides: a model's own cell lies on the diagonal.
    models = dict.fromkeys(name for c in cells for name in (c.source, c.target))
    sources, targets = {c.source for c in cells}, {c.target for c in cells}
    return Matrix(
        sources=tuple(name for name in models if name in sources),
        targets=tuple(name for name in models if name in targets),
        cells=tuple(cells),
    )


def cell(source: str, target: str, entry: WMatrixEntry) -> Cell:
    """What one W-Matrix was measured to keep on its own; nothing where nobody measured it."""
    if (found := entry.certificate) is None:
        return Cell(source=source, target=target, retention=None, basis=None)
    told = (
        f"{entry.path.name}: {found.counts['texts']} texts of {found.protocol.context} tokens, "
        f"{found.measured}"
    )
    basis = Basis(kind="measured", source=told, digest=entry.digest)
    return Cell(source=source, target=target, retention=found.retention, basis=basis)


def names_of(models: Iterable[Geometry]) -> dict[str, str]:
    """A name for each model, by fingerprint; different models of one name carry it in theirs."""
    names: dict[str, str] = {}
    for model in models:
        names.setdefault(fingerprint(model), model.name)
    shared = list(names.values())
    return {
        mark: name if shared.count(name) == 1 else f"{name} ({mark[:8]})"
        for mark, name in names.items()
    }


def fingerprint(model: Geometry) -> str:
    """The same for the same model, as `Geometry.same_model` understands it."""
    identity = [model.weights, model.tokenizer, [x.model_dump(mode="json") for x in model.layers]]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
