"""Names and spellings that exist for the published interface alone; whatever else the two documents
import has one name, in its own folder. `awareness_vllm` exports both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.aligners.multihop import AlignmentPath, MultiHopRouter
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.compatibility.context import MemoryListing, memory_info
from awareness_vllm.compatibility.models import model
from awareness_vllm.compatibility.priors import COLUMN, find_name, published_route
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.packages.file import Package

State = MemoryListing | Package | str | Path
"""What `memory_state` may be; a listing only of a model without weights."""


@dataclass(frozen=True)
class PublishedPath(AlignmentPath):
    """An `AlignmentPath` with the second published spelling of two fields."""

    @property
    def path(self) -> tuple[str, ...]:
        """`route`."""
        return self.route

    @property
    def estimated_retention(self) -> float | None:
        """`optimal_retention`."""
        return self.optimal_retention


class MultiHopAligner(MultiHopRouter):
    """Finds routes between models: over W-Matrices, and by published figures for models that are
    known by a published name alone.

        path = MultiHopAligner().find_optimal_path(source="falcon-180b", target="phi-3-medium")
        print(" -> ".join(path.route), f"{path.optimal_retention:.1%}", path.basis)
        print(f"{path.direct_retention:.1%} {path.improvement:+.1%}")

    `path.path` is also `path.route`, `path.estimated_retention` also `path.optimal_retention`. A
    path by published figures has the basis "prior" and no W-Matrices: nothing can be composed of it
    or loaded over it.
    """

    def find_optimal_path(
        self,
        source: str | Path,
        target: str | Path,
        memory_state: State | None = None,
        *,
        uncertified: bool = False,
        texts: Sequence[Document] | None = None,
        anchors: Sequence[Document] | None = None,
        limit: int = 8,
    ) -> PublishedPath:
        """The route with the highest retention, as `MultiHopRouter.find_optimal_path`.

        Args:
            memory_state: of a model known by its published name, anything with `source_model` and
                `token_count`.

        Raises:
            UnsupportedModel: `texts` to measure on, for a model without weights.
        """
        start, end = model(source, self.registry), model(target, self.registry)
        names = find_name(start.name), find_name(end.name)
        if (start.geometry and end.geometry) or names[0] is None or names[1] is None:
            if not isinstance(memory_state, Package | str | Path | None):
                raise BadInput(
                    "the memory of a model at hand is a package",
                    found=f"memory_state={memory_state!r}"[:80],
                    expected="a package, its file or its ID",
                )
            path = super().find_optimal_path(
                source,
                target,
                memory_state,
                uncertified=uncertified,
                texts=texts,
                anchors=anchors,
                limit=limit,
            )
            return PublishedPath(**vars(path))
        if texts is not None:
            raise UnsupportedModel(
                f"nothing can be measured from {names[0]} to {names[1]}",
                found="models that are known by their published names alone",
                expected="the folders of both models, and W-Matrices between them",
                remedy="leave texts out: the path is then a published figure",
            )
        return self._published(names[0], names[1], memory_state)

    def _published(self, source: str, target: str, memory: State | None) -> PublishedPath:
        """The path by published figures, by default for a context of medium length."""
        if source == target:
            return PublishedPath((source,), (), 1.0, 1.0, "exact", "one model: a copy")
        tokens = COLUMN
        if memory is not None:
            info = memory_info(memory, self.store, self.registry)
            tokens = info.tokens
            if find_name(info.source.name) != source:
                raise UnsupportedModel(
                    "the memory was captured on another model",
                    found=info.source.name,
                    expected=source,
                )
        route, retention, direct = published_route(source, target, tokens)
        note = "by published figures, which were not measured here; nothing can be loaded over it"
        return PublishedPath(route, (), direct, retention, "prior", note)


MultiHopMemoryAligner = MultiHopAligner
