"""`MultiHopAligner`: the way from one model to another over the W-Matrices at hand.

What a route keeps is estimated by the product of what its hops are certified to keep, and an
estimate is all that is: errors of two hops may add up or fall into one another, and the folded map
that serves a route is neither hop. Given texts, the folded map is measured like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput, NoWMatrix, UnsupportedModel, similar_names
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.files import models_dir
from awareness_vllm.fit.compose import Hop, compose, learn_bridge
from awareness_vllm.models.describe import geometry_of, is_model_folder, resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.file import Package
from awareness_vllm.packages.manifest import Manifest, read_manifest
from awareness_vllm.packages.store import locate
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.registry import Registry
from awareness_vllm.wmatrix.routes import Hops, best, expected, names, note

CONTEXT, CONTINUATION = 300, 60
"""Tokens of the texts that a route is measured on, unless a memory says how long."""


@dataclass(frozen=True)
class AlignmentPath:
    """The best way found. Retentions are None where nobody knows them.

    `basis` says what `optimal_retention` is: "exact" (one model: a copy), "certified" (one hop),
    "estimated" (a product of certificates), "measured" (here, in five arms, as is then
    `direct_retention`). `note` says how the direct map fared; `folded` is the one map of several
    hops, where it was needed to measure.
    """

    route: tuple[str, ...]
    hops: Hops
    direct_retention: float | None
    optimal_retention: float | None
    basis: Literal["exact", "certified", "estimated", "measured"] | None
    note: str
    composed_map: WMatrix | None = None

    @property
    def improvement(self) -> float | None:
        """What the route keeps more than the direct map; 0 where the direct map is the route."""
        if self.direct_retention is None or self.optimal_retention is None:
            return None
        return self.optimal_retention - self.direct_retention

    @property
    def path(self) -> tuple[str, ...]:
        """`route`, by its other published name."""
        return self.route

    @property
    def estimated_retention(self) -> float | None:
        """`optimal_retention`, by its other published name."""
        return self.optimal_retention


class MultiHopAligner:
    """Finds ways over W-Matrices, and folds them.

    Args:
        wmatrices: a registry, or files and folders, by default `$AWARENESS_HOME/wmatrices`.
        models: folders of models, besides `$AWARENESS_HOME/models/NAME`; they are needed only to
            measure and to learn bridges.
        store: folder in which IDs of memories are looked up.
    """

    def __init__(
        self,
        wmatrices: Registry | Sequence[str | Path] | None = None,
        *,
        models: Sequence[str | Path] = (),
        store: Path | None = None,
    ) -> None:
        self.registry = Registry.read(wmatrices)
        self.models = list(models)
        self.store = store

    def find_optimal_path(
        self,
        source: str | Path,
        target: str | Path,
        memory_state: Package | str | Path | None = None,
        *,
        uncertified: bool = False,
        texts: Sequence[Document] | None = None,
        anchors: Sequence[Document] | None = None,
        limit: int = 8,
    ) -> AlignmentPath:
        """The way that keeps most.

        Args:
            source, target: names of models as the W-Matrices have them, or folders.
            memory_state: a memory of the source; certificates are asked about its length.
            uncertified: go over maps that nobody has measured, too, where no other way leads.
            texts: measure the direct map and the best other way, folded, on at most `limit` of
                these, instead of multiplying certificates.
            anchors: texts to learn bridges from (`fold`), none of them among `texts`.

        Raises:
            BadInput: no W-Matrix knows a model of that name, or several do.
            NoWMatrix: no way leads there.
            UnsupportedModel: the memory is another model's, or a model to measure with is missing.
        """
        start, end = self.model(source), self.model(target)
        memory = None if memory_state is None else self._manifest(memory_state, start)
        if start.same_model(end):
            return AlignmentPath((start.name,), (), 1.0, 1.0, "exact", "one model: a copy")
        context = memory.tokens if memory else None
        usable = self.registry.usable(memory is None or memory.has_text)
        known = usable if uncertified else usable.certified()
        direct = best(known, start, end, context, direct=True)
        others = best(known, start, end, context, direct=False)
        ways = [way for way in (direct, others) if way]
        if not ways:
            raise self._no_way(usable, start, end)
        if texts is not None:
            return self._measured(ways, direct, texts, anchors, context or CONTEXT, limit)
        # Of two ways that nobody knows anything of, the direct one, which stands first.
        way = max(ways, key=lambda w: -math.inf if (r := expected(w, context)) is None else r)
        most = expected(way, context)
        return AlignmentPath(
            names(way),
            way,
            expected(direct, context) if direct else None,
            most,
            None if most is None else "certified" if len(way) == 1 else "estimated",
            note(usable, start, end, way, direct),
        )

    def compose(self, path: AlignmentPath, anchors: Sequence[Document] | None = None) -> WMatrix:
        """The one map that serves a path, as dear as a direct one of its rank, not certified.

        Args:
            anchors: texts that the models read to learn the bridges between hops; without them
                hops are multiplied out, which is only good where each gets *all* of its target's
                states right (see `wmatrix/fold.py`).

        Raises:
            BadInput: a path without hops; UnsupportedModel: a model to read with is missing.
        """
        if not path.hops:
            raise BadInput(
                "there is nothing to fold",
                found=f"the path {' → '.join(path.route)}",
                expected="at least one W-Matrix on the way",
            )
        return path.composed_map or self._composed(path.hops, anchors)

    def model(self, model: str | Path) -> Geometry:
        """A model by its folder, or by the name that W-Matrices know it by. Raises BadInput."""
        if is_model_folder(model):
            geometry = geometry_of(model)
            self.models.append(model)
            return geometry
        known = self.registry.models()
        found = [g for g in known if g.name == str(model)]
        if len(found) == 1:
            return found[0]
        all_names = sorted({g.name for g in known})
        near = similar_names(model, all_names) or all_names
        raise BadInput(
            f"{len(found) or 'no'} models of the W-Matrices are named {str(model)!r}",
            found=self.registry,
            expected=f"one of {', '.join(near)}" if near else "a W-Matrix that leads from or to it",
            remedy="give the model's folder" if found else "give a known name, or more W-Matrices",
        )

    def folder(self, model: Geometry) -> Path:
        """Where a model lies. Raises UnsupportedModel."""
        default = models_dir() / model.name
        at_hand = [*self.models, *([default] if default.is_dir() else [])]
        for folder in map(resolve_folder, at_hand):
            if geometry_of(folder).same_model(model):
                return folder
        raise UnsupportedModel(
            f"the model {model.name} is not at hand",
            found=", ".join(map(str, at_hand)) or "no folder of a model",
            expected=f"a folder with these weights ({model.weights[:12]}) and their tokenizer",
            remedy=f"give the folder, or put it at {default}",
        )

    def _composed(self, hops: Hops, anchors: Sequence[Document] | None) -> WMatrix:
        wmatrix = load(hops[0].path)
        for hop in hops[1:]:
            second, bridge = load(hop.path), None
            if anchors is not None and not wmatrix.manifest.residual:
                ends = (wmatrix.manifest.source, second.manifest.source, second.manifest.target)
                a, b, c = (self.folder(geometry) for geometry in ends)
                bridge = learn_bridge(
                    Hop(wmatrix, a, load_model(a)),
                    Hop(second, b, load_model(b)),
                    c,
                    load_model(c).get_input_embeddings(),
                    anchors,
                )
            wmatrix = compose(wmatrix, second, bridge=bridge)
        return wmatrix

    def _measured(
        self,
        ways: Sequence[Hops],
        direct: Hops | None,
        texts: Sequence[Document],
        anchors: Sequence[Document] | None,
        context: int,
        limit: int,
    ) -> AlignmentPath:
        """The best of these ways, each measured in five arms."""
        found: list[tuple[float, WMatrix]] = []
        harness: EvalHarness | None = None
        for way in ways:
            wmatrix = self._composed(way, anchors)
            ends = self.folder(wmatrix.manifest.source), self.folder(wmatrix.manifest.target)
            harness = harness or EvalHarness(*ends, wmatrix)
            harness.wmatrix = wmatrix
            figures = evaluate_texts(
                harness, texts, context=context, continuation=CONTINUATION, limit=limit
            )
            found.append((figures.retention()["mean"], wmatrix))
        pairs = list(zip(ways, found, strict=True))
        way, (most, composed_map) = max(pairs, key=lambda pair: pair[1][0])
        each = ", ".join(f"{' → '.join(names(w))} keeps {k:.3f}" for w, (k, _) in pairs)
        direct_kept = found[0][0] if direct else None  # it stands first
        return AlignmentPath(names(way), way, direct_kept, most, "measured", each, composed_map)

    def _manifest(self, memory: Package | str | Path, source: Geometry) -> Manifest:
        """The memory's manifest, if it is one of the source's."""
        if isinstance(memory, Package):
            manifest = memory.manifest
        else:
            manifest = read_manifest(locate(memory, self.store))
        if not manifest.geometry.same_model(source):
            raise UnsupportedModel(
                "the memory was captured on another model",
                found=manifest.geometry.name,
                expected=f"{source.name} (weights {source.weights[:12]})",
            )
        return manifest

    def _no_way(self, usable: Registry, start: Geometry, end: Geometry) -> NoWMatrix:
        unmeasured = best(usable, start, end, None, direct=True) or best(
            usable, start, end, None, direct=False
        )
        remedy = "fit one with `awareness fit`"
        if unmeasured:
            missing = ", ".join(str(e) for e in unmeasured if not e.certificate)
            remedy = f"`awareness certify` {missing}, or ask for uncertified maps too"
        return NoWMatrix(
            f"no way leads from {start.name} to {end.name}",
            found=self.registry,
            expected="certified W-Matrices that lead there, one after another",
            remedy=remedy,
        )


MultiHopMemoryAligner = MultiHopAligner
