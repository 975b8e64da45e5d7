"""`MultiHopRouter`: the route from one model to another over W-Matrices.

The retention of a route is estimated by the product of its maps' certificates, and an estimate is
all that is: the errors of two maps may add up or cancel, and the composed map that serves a route
is neither of them. With texts, the composed map is measured like any other.
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
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import is_model_folder, resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.file import Package
from awareness_vllm.packages.manifest import Manifest, read_manifest
from awareness_vllm.packages.store import locate
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.registry import Registry
from awareness_vllm.wmatrix.routes import Route, best_route, expected_retention, names, note

CONTEXT, CONTINUATION = 300, 60
"""Tokens of the texts that a route is measured on, unless a memory says how long."""
Basis = Literal["exact", "certified", "estimated", "measured", "prior"]


@dataclass(frozen=True)
class AlignmentPath:
    """The best route. Unknown retentions are None.

    `basis` is that of `optimal_retention`: "exact" (one model: a copy), "certified" (one map),
    "estimated" (a product of certificates), "measured" (here, in five arms, as is then
    `direct_retention`), "prior" (published, for models without weights: no W-Matrices, nothing to
    compose). `note` compares the route with the direct map; `composed_map` is the one map of
    several W-Matrices, where it was needed to measure.
    """

    route: tuple[str, ...]
    wmatrices: Route
    direct_retention: float | None
    optimal_retention: float | None
    basis: Basis | None
    note: str
    composed_map: WMatrix | None = None

    @property
    def improvement(self) -> float | None:
        """The retention that the route adds to the direct map's; 0 where that is the route."""
        if self.direct_retention is None or self.optimal_retention is None:
            return None
        return self.optimal_retention - self.direct_retention


class MultiHopRouter:
    """Finds routes over W-Matrices, and composes one map of them.

    Args:
        wmatrices: a registry, or files and folders, by default `$AWARENESS_HOME/wmatrices`.
        models: folders of models, besides `$AWARENESS_HOME/models/NAME`, to measure and to learn
            bridges with.
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
        """The route with the highest retention.

        Args:
            source, target: names of models as the W-Matrices have them, or folders.
            memory_state: a memory of the source: a package, its file or its ID. Retentions are then
                those of its length.
            uncertified: use maps without a certificate, too, where no other route leads.
            texts: measure the direct map and the best other route, composed, on at most `limit` of
                these, instead of multiplying certificates.
            anchors: texts to learn bridges from (`compose`), none of them among `texts`.

        Raises:
            BadInput: an unknown name, or one that several models have.
            NoWMatrix: no route leads there.
            UnsupportedModel: the memory is another model's, or a model to measure with is missing.
            UnsupportedRequest: the memory is a latent package.
        """
        start, end = self.model(source), self.model(target)
        memory = None if memory_state is None else self._manifest(memory_state, start)
        if start.same_model(end):
            return AlignmentPath((start.name,), (), 1.0, 1.0, "exact", "one model: a copy")
        context = memory.tokens if memory else None
        usable = self.registry.usable(memory is None or memory.has_text)
        maps = usable if uncertified else usable.certified()
        direct = best_route(maps, start, end, context, direct=True)
        others = best_route(maps, start, end, context, direct=False)
        routes = [route for route in (direct, others) if route]
        if not routes:
            raise self._no_route(usable, start, end)
        if texts is not None:
            return self._measured(routes, direct, texts, anchors, context or CONTEXT, limit)
        # Of two routes of unknown retention the direct one, which stands first.
        route = max(
            routes, key=lambda r: -math.inf if (e := expected_retention(r, context)) is None else e
        )
        retention = expected_retention(route, context)
        return AlignmentPath(
            names(route),
            route,
            expected_retention(direct, context) if direct else None,
            retention,
            None if retention is None else "certified" if len(route) == 1 else "estimated",
            note(usable, start, end, route, direct),
        )

    def compose(self, path: AlignmentPath, anchors: Sequence[Document] | None = None) -> WMatrix:
        """The one map that serves a path, at the cost of a direct one of its rank, not certified.

        Args:
            anchors: texts that the models read to learn the bridges between maps; without them the
                maps are multiplied out, which is only good where each gets *all* of its target's
                states right (see `fit/compose.py`).

        Raises:
            BadInput: a path without W-Matrices, as of one model or of published figures.
            UnsupportedModel: a model to read with is missing.
        """
        if not path.wmatrices:
            raise BadInput(
                "there is nothing to compose",
                found=f"the path {' → '.join(path.route)} ({path.basis})",
                expected="at least one W-Matrix on the route",
            )
        return path.composed_map or self._composed(path.wmatrices, anchors)

    def model(self, model: str | Path) -> Geometry:
        """A model by its folder, or by its name in the W-Matrices. Raises BadInput."""
        if is_model_folder(model):
            self.models.append(model)
        if (geometry := self.registry.model(model)) is not None:
            return geometry
        known = sorted({geometry.name for geometry in self.registry.models()})
        near = similar_names(model, known) or known
        raise BadInput(
            f"unknown model {str(model)!r}",
            found=self.registry,
            expected=f"one of {', '.join(near)}" if near else "a W-Matrix that leads from or to it",
            remedy="give a known name, the model's folder, or more W-Matrices",
        )

    def folder(self, model: Geometry) -> Path:
        """The folder of a model. Raises UnsupportedModel."""
        default = models_dir() / model.name
        folders = [*self.models, *([default] if default.is_dir() else [])]
        for folder in map(resolve_folder, folders):
            if geometry_of(folder).same_model(model):
                return folder
        raise UnsupportedModel(
            f"the model {model.name} is not at hand",
            found=", ".join(map(str, folders)) or "no folder of a model",
            expected=f"a folder of {model.identity}",
            remedy=f"give the folder, or put it at {default}",
        )

    def _composed(self, route: Route, anchors: Sequence[Document] | None) -> WMatrix:
        wmatrix = load(route[0].path)
        for entry in route[1:]:
            second, bridge = load(entry.path), None
            if anchors is not None and not wmatrix.manifest.residual:
                models = (wmatrix.manifest.source, second.manifest.source, second.manifest.target)
                a, b, c = (self.folder(geometry) for geometry in models)
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
        routes: Sequence[Route],
        direct: Route | None,
        texts: Sequence[Document],
        anchors: Sequence[Document] | None,
        context: int,
        limit: int,
    ) -> AlignmentPath:
        """The best of these routes, each measured in five arms; the direct one stands first."""
        results: list[tuple[float, WMatrix]] = []
        harness: EvalHarness | None = None
        for route in routes:
            wmatrix = self._composed(route, anchors)
            manifest = wmatrix.manifest
            folders = self.folder(manifest.source), self.folder(manifest.target)
            harness = harness or EvalHarness(*folders, wmatrix)
            harness.wmatrix = wmatrix
            figures = evaluate_texts(
                harness, texts, context=context, continuation=CONTINUATION, limit=limit
            )
            results.append((figures.retention()["mean"], wmatrix))
        pairs = list(zip(routes, results, strict=True))
        route, (retention, composed_map) = max(pairs, key=lambda pair: pair[1][0])
        each = ", ".join(f"{' → '.join(names(r))} keeps {kept:.3f}" for r, (kept, _) in pairs)
        of_direct = results[0][0] if direct else None
        return AlignmentPath(
            names(route), route, of_direct, retention, "measured", each, composed_map
        )

    def _manifest(self, memory: Package | str | Path, source: Geometry) -> Manifest:
        """The memory's manifest. Raises UnsupportedModel for one of another model,
        UnsupportedRequest for a latent, which only the map that made it can move."""
        if isinstance(memory, str | Path):
            manifest = read_manifest(locate(memory, self.store))
        else:
            manifest = memory.manifest
        manifest.check_states()
        if not manifest.geometry.same_model(source):
            raise UnsupportedModel(
                "the memory was captured on another model",
                found=manifest.geometry.identity,
                expected=source.identity,
            )
        return manifest

    def _no_route(self, usable: Registry, start: Geometry, end: Geometry) -> NoWMatrix:
        uncertified = best_route(usable, start, end, None, direct=True) or best_route(
            usable, start, end, None, direct=False
        )
        remedy = "fit one with `awareness fit`"
        if uncertified:
            missing = ", ".join(str(entry) for entry in uncertified if not entry.certificate)
            remedy = f"`awareness certify` {missing}, or ask for uncertified maps too"
        return NoWMatrix(
            f"no route leads from {start.name} to {end.name}",
            found=self.registry,
            expected="certified W-Matrices that lead there, one after another",
            remedy=remedy,
        )
