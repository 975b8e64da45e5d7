"""From the memory IDs of a request to the beginning of its prompt, in the server's front end."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.errors import QualityUnreachable, UnsupportedRequest
from awareness_vllm.packages.file import read_text, read_tokens
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.prompt import Prompt, ResolvedMemory
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tenants import stores_of
from awareness_vllm.wmatrix.registry import Registry
from awareness_vllm.wmatrix.verdict import check_fits, verdict

MAX_RESOLVED = 1024
"""Memories whose prompt ids are cached, so that a hot request does not tokenize them again."""


class MemoryResolver:
    """Looks memories up in the tenants' stores for one served model. Reads files, never the engine.

    Args:
        stores: by tenant.
        registry: the W-Matrices at hand.
        tail: last tokens of a realigned memory that the model reads itself.
    """

    def __init__(
        self, model: ServedModel, stores: Mapping[str, Store], registry: Registry, tail: int
    ) -> None:
        self.model, self.stores, self.registry, self.tail = model, stores, registry, tail
        # An ID names bytes, which `checked_path` has proven: what they resolve to cannot change.
        self._resolve_path = functools.lru_cache(MAX_RESOLVED)(self._resolve_uncached)

    @classmethod
    def from_config(cls, config: ServingConfig, model: ServedModel) -> MemoryResolver:
        """Raises BadInput, WMatrixCorrupt: a tenants file or W-Matrix that cannot be used."""
        return cls(model, stores_of(config), Registry.read(config.wmatrices), config.tail)

    def resolve(
        self, request: MemoryRequest, tenant: str, caller_salt: str | None = None
    ) -> Prompt:
        """The prompt of a request's memories; everything that can be wrong with them comes up here.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt, NoWMatrix, UnsupportedRequest,
            QualityUnreachable
        """
        memories = tuple(self.resolve_one(memory_id, tenant) for memory_id in request.ids)
        last = memories[-1]
        tail: int | None = min(self.tail, last.tokens) if last.wmatrix else 0
        if request.quality_target is not None:
            try:
                tail = tail_for(memories, request.quality_target)
            except QualityUnreachable:
                if request.on_low_quality == "fail":
                    raise
                if request.on_low_quality == "recompute":
                    tail = None
        return Prompt(memories, tail, tenant, caller_salt or "")

    def resolve_one(self, memory_id: object, tenant: str) -> ResolvedMemory:
        """One memory of a tenant. Raises as `resolve` does."""
        return self._resolve_path(self.stores[tenant].checked_path(memory_id))

    def _resolve_uncached(self, path: Path) -> ResolvedMemory:
        manifest, model = read_manifest(path), self.model
        decision = verdict(path.stem, manifest.geometry, model.geometry, self.registry, manifest)
        if decision.refusal is not None:
            raise decision.refusal
        if decision.entry is None:
            ids = read_tokens(path)
            return ResolvedMemory(path.stem, path, None, ids, model.prefix_length(ids))
        sink = decision.entry.manifest.sink
        ids = prompt_ids(read_text(path), sink, model.folder)
        return ResolvedMemory(path.stem, path, decision.entry, ids, len(sink))

    def append_question(self, prompt: Prompt, question: list[int]) -> list[int]:
        """The memories' ids, then those of the request's own prompt.

        Raises:
            UnsupportedRequest: an empty question, or memories that this model cannot move;
            ContextTooLong: it does not fit.
        """
        moved = prompt.memories if prompt.head else prompt.memories[1:]
        geometry = self.model.geometry
        if moved and geometry.additive and prompt.loads:
            raise UnsupportedRequest(
                f"memory {moved[0].id} cannot stand there",
                found=f"a memory after other tokens, and {geometry.name}'s learned positions",
                expected="a prompt that begins with one memory: its states hold where they stand",
                remedy="ask with one memory in /v1/completions",
            )
        if not question:
            raise UnsupportedRequest(
                "the prompt is empty",
                found=f"{len(prompt.ids)} tokens of memory and none of prompt",
                expected="at least one token to answer",
                remedy="put the question into the prompt",
            )
        names = " ".join(memory.id for memory in prompt.memories)
        check_fits(f"memory {names}", len(prompt.ids), len(question), self.model.max_model_len)
        return [*prompt.ids, *question]


def tail_for(memories: Sequence[ResolvedMemory], quality_target: float) -> int:
    """The native tail with which every memory reaches its target; only the last one can have any.

    Raises:
        QualityUnreachable: one of them does not.
    """
    for memory in memories[:-1]:
        memory.plan(quality_target, tails=False)
    plan = memories[-1].plan(quality_target, tails=True)
    return min(plan.tail, memories[-1].tokens) if plan else 0
