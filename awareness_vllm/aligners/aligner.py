"""`KVCacheAligner`: the target's cache of a memory package."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from awareness_vllm.align.realign import AlignedMemory, copy, realign, sources
from awareness_vllm.aligners.training_free import (
    Configuration,
    TrainingFree,
    correspondence,
    training_free,
    warn,
)
from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.errors import QualityUnreachable, UnsupportedModel
from awareness_vllm.evaluate.conditions import EvalHarness, cut_tail
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import cache_states, inputs_after, load_model, sink_ids, states
from awareness_vllm.packages.file import AnyPackage, Package, verify, with_states
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.packages.store import locate
from awareness_vllm.wmatrix.certificate import Interval, Plan
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.heads import head_mapping_summary, table
from awareness_vllm.wmatrix.plans import PlanBasis, basis_of, cheapest, with_tail
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTINUATION = 60
"""Tokens that are scored after a memory where `align` measures its quality."""


@dataclass(frozen=True)
class Basis:
    """The origin of a quality: `measured` in five arms at `context` tokens, `extrapolated` from
    shorter contexts or from states that no int8 has rounded, or `exact`, the same model's own
    states. `digest` is that of the W-Matrix file whose certificate has it, of the texts that it was
    measured on, or of the package."""

    kind: Literal["measured", "extrapolated", "exact"]
    digest: str
    context: int


@dataclass(frozen=True)
class AlignedState(AlignedMemory):
    """The target's cache of a memory. `quality_score` is retention, None for a map that was never
    measured; `interval` its 95 % interval, `basis` its origin. The states of the last `tail` tokens
    were computed by the target itself, after the others."""

    quality_score: float | None = None
    interval: Interval | None = None
    basis: Basis | None = None
    tail: int = 0


class KVCacheAligner:
    """Aligns memories of one model to another's cache.

        aligner = KVCacheAligner(source_model="models/a", target_model="models/b")
        aligner.configure(head_mapping="learned")
        aligned_state = aligner.align(kv_cache="mem_…", quality_target=0.93)
        print(f"{aligner.head_mapping_summary()} {aligned_state.quality_score:.3f}")

    Args:
        source_model, target_model: Hugging Face folders, or names in the local hub cache.
        wmatrix: W-Matrix files or folders of them, by default `$AWARENESS_HOME/wmatrices`.
        store: folder in which IDs of memories are looked up.

    Raises:
        UnsupportedModel: a closed model, a missing one, or one whose cache cannot be described.
    """

    def __init__(
        self,
        source_model: str | Path,
        target_model: str | Path,
        *,
        wmatrix: str | Path | Sequence[str | Path] | None = None,
        store: Path | None = None,
    ) -> None:
        self.source, self.target = resolve_folder(source_model), resolve_folder(target_model)
        self.source_geometry = geometry_of(self.source)
        self.target_geometry = geometry_of(self.target)
        self.paths = [wmatrix] if isinstance(wmatrix, str | Path) else wmatrix
        self.store = store
        self.configuration = Configuration()

    def configure(
        self,
        *,
        head_mapping: str = "learned",
        merge_strategy: str = "weighted",
        split_strategy: str = "projection",
        preserve_group_query: bool = True,
    ) -> KVCacheAligner:
        """Choose the head mapping; all but "learned" are training-free and warn when used.

        Args:
            head_mapping: "learned" (a W-Matrix), "uniform" (by place), "identity" (head by head).
            merge_strategy: several source heads to one: "mean", or "weighted" by their keys' norms.
            split_strategy: one source head to several: "repeat", or "projection" (rotated copies).
            preserve_group_query: heads keep to the groups of query heads that they serve.

        Raises:
            BadInput: an unknown name, or an option that a learned map does not have.
            UnsupportedModel: heads of these models that cannot be mapped so.
        """
        configuration = Configuration(
            head_mapping, merge_strategy, split_strategy, preserve_group_query
        )
        if not configuration.learned:
            correspondence(self.source_geometry, self.target_geometry, configuration)
        self.configuration = configuration
        return self

    def align(
        self,
        kv_cache: AnyPackage | str | Path,
        quality_target: float | None = None,
        *,
        texts: Sequence[Document] | None = None,
        limit: int = 8,
    ) -> AlignedState:
        """The target's cache of a memory.

        Args:
            kv_cache: a package, its file, or its ID in the store.
            quality_target: the least retention. The cheapest measured plan that keeps it is taken;
                where the plan has a native tail, the target reads these tokens here.
            texts: measure retention here, in five arms on at most `limit` of these texts at the
                memory's length, instead of taking the certificate's.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt: no such memory, or a damaged one.
            UnsupportedRequest: a latent package, and no learned map.
            UnsupportedModel: captured on another model, or heads that cannot be mapped.
            NoWMatrix: no learned map leads from the source to the target.
            QualityUnreachable: no measured retention reaches it; `best` is the highest.
        """
        package = self._package(kv_cache)
        if self.configuration.learned and self.source_geometry.same_model(self.target_geometry):
            basis = Basis("exact", package.manifest.payload, package.manifest.tokens)
            whole = copy(with_states(package))
            return AlignedState(**vars(whole), quality_score=1.0, basis=basis)
        wmatrix, entry = self._map(package.manifest)
        context = len(sources(package, wmatrix.manifest, self.target)[1])
        if texts is not None:
            interval = self.measured(wmatrix, texts, context, limit)
            check_reached(interval, quality_target, f"on at most {limit} texts")
            of_map: PlanBasis = "extrapolated" if package.manifest.rounded else "measured"
            basis, tail = Basis(of_map, digest(texts), context), 0
        elif (plan := certified_plan(entry, quality_target, context)) is not None:
            assert entry is not None
            assert entry.certificate is not None
            interval, tail = plan.retention, plan.tail
            kind = basis_of(entry.certificate, context, rounded=package.manifest.rounded)
            basis = Basis(kind, entry.digest, plan.context)
        else:
            return AlignedState(**vars(self._realign(package, wmatrix)))
        memory = self._with_tail(self._realign(package, wmatrix), tail)
        return AlignedState(
            **vars(memory), quality_score=interval.mean, interval=interval, basis=basis, tail=tail
        )

    def measured(
        self, wmatrix: WMatrix, texts: Sequence[Document], context: int, limit: int
    ) -> Interval:
        """Retention of the map alone in five arms, after contexts of `context` tokens."""
        figures = evaluate_texts(
            EvalHarness(self.source, self.target, wmatrix),
            texts,
            context=context,
            continuation=CONTINUATION,
            limit=limit,
            progress=False,
        )
        return Interval(**figures.retention())

    def head_mapping_summary(self, top: int = 3) -> str:
        """A table of each target head's `top` source heads, by their share of the map's weight."""
        wmatrix, _ = self._map()
        if isinstance(wmatrix, TrainingFree):
            return table(wmatrix.head_mapping())
        return table(head_mapping_summary(wmatrix, top))

    @functools.cached_property
    def target_model(self) -> PreTrainedModel:
        return load_model(self.target)

    def _package(self, kv_cache: AnyPackage | str | Path) -> AnyPackage:
        """The memory. Raises UnsupportedModel for one of another model than the source."""
        package = (
            kv_cache
            if isinstance(kv_cache, Package | LatentPackage)
            else verify(locate(kv_cache, self.store))
        )
        if not package.geometry.same_model(self.source_geometry):
            other, source = package.geometry, self.source_geometry
            raise UnsupportedModel(
                "the memory was captured on another model than this aligner's source",
                found=other.identity,
                expected=source.identity,
                remedy="give the model that made the memory as source_model",
            )
        return package if self.configuration.learned else with_states(package)

    def _map(self, manifest: Manifest | None = None) -> tuple[WMatrix, WMatrixEntry | None]:
        """The map for a package, by default for any with its text, and its entry in the registry
        where it is a learned one."""
        if not self.configuration.learned:
            warn(self.configuration, self.source_geometry, self.target_geometry)
            sink = sink_ids(self.target)
            return training_free(
                self.source_geometry,
                self.target_geometry,
                self.configuration,
                sink,
                states(self.target_model, sink),
            ), None
        registry = Registry.read(self.paths)
        source, target = self.source_geometry, self.target_geometry
        if manifest is None:
            entry = registry.find(source, target, has_text=True)
        else:
            entry = registry.find_for(manifest, target)
        return load(entry.path), entry

    def _realign(self, package: AnyPackage, wmatrix: WMatrix) -> AlignedMemory:
        embed = self.target_model.get_input_embeddings()
        dtype = getattr(torch, self.target_geometry.dtype)
        return realign(package, wmatrix, self.target, embed, dtype=dtype)

    @torch.inference_mode()
    def _with_tail(self, memory: AlignedMemory, tail: int) -> AlignedMemory:
        """The memory with its last `tail` tokens read by the target after the others."""
        if not tail:
            return memory
        head, ids = cut_tail(memory, tail)
        inputs = inputs_after(head.keys, head.values, ids)
        self.target_model.base_model(torch.tensor([ids]), **inputs)
        dtype = memory.keys[0].dtype
        keys, values = (
            [s.to(dtype) for s in part] for part in cache_states(inputs["past_key_values"])
        )
        return AlignedMemory(memory.ids, keys, values)


def certified_plan(
    entry: WMatrixEntry | None, quality_target: float | None, context: int
) -> Plan | None:
    """The certificate's cheapest plan for a quality, by default its plan for the map alone; None
    without a certificate.

    Raises:
        QualityUnreachable: no plan keeps `quality_target`, or there is no certificate.
    """
    certificate = entry.certificate if entry else None
    if certificate is None:
        check_reached(None, quality_target, "this mapping was never measured")
        return None
    if quality_target is None:
        return with_tail(certificate, context, 0)
    return cheapest(certificate, quality_target, context)


def check_reached(interval: Interval | None, quality_target: float | None, how: str) -> None:
    """Raises QualityUnreachable where `interval` is not known to reach `quality_target`."""
    best = interval.mean if interval else None
    if quality_target is None or (best is not None and best >= quality_target):
        return
    raise QualityUnreachable(
        f"this mapping was not measured to keep {quality_target:.3f}",
        best=best,
        found=how if best is None else f"{best:.3f}, {how}",
        expected=f"at least {quality_target:.3f}",
        remedy="`awareness certify` a learned map, whose plans also say what a native tail adds; "
        "give texts to measure on; or lower quality_target",
    )
