"""What a server can load: its stores, its W-Matrices and its own model, asked by memory ID."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.errors import QualityUnreachable, UnsupportedRequest
from awareness_vllm.models.describe import geometry_of, resolve_folder
from awareness_vllm.models.tokens import load_tokenizer, prefix_ids
from awareness_vllm.packages.file import read_text, read_tokens
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.tenants import Tenants
from awareness_vllm.wmatrix.certificate import Plan, cheapest, with_tail
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import check_fits, verdict

RESOLVED = 1024
"""Memories whose prompt ids are kept, so that a hot request does not tokenize them again."""


@dataclass(frozen=True)
class Resolved:
    """A memory that this server can load: its file, the map (None: a copy) and its prompt ids, of
    which the first `prefix` only stand at a prompt's beginning."""

    memory: str
    path: Path
    wmatrix: WMatrixEntry | None
    ids: list[int]
    prefix: int

    @property
    def tokens(self) -> int:
        """Tokens of the memory's own text."""
        return len(self.ids) - self.prefix

    def retention(self, tail: int = 0) -> float | None:
        """What is certified to be kept with the last `tail` tokens read natively; a copy keeps all.
        None where nothing was measured."""
        if self.wmatrix is None:
            return 1.0
        if self.wmatrix.certificate is None:
            return None
        return with_tail(self.wmatrix.certificate, self.tokens, tail).retention.mean

    def plan(self, quality_target: float, *, tails: bool) -> Plan | None:
        """The cheapest certified way to load that keeps so much; None for a copy, which keeps all.

        Raises:
            QualityUnreachable: none keeps it, or none was measured.
        """
        if self.wmatrix is None:
            return None
        certificate = self.wmatrix.certificate
        if certificate is None:
            raise QualityUnreachable(
                f"memory {self.memory} comes through a W-Matrix that is not certified",
                found=self.wmatrix.path.name,
                expected=f"one that is measured to keep {quality_target}",
                remedy="`awareness certify`, or leave quality_target out",
            )
        return cheapest(certificate, quality_target, self.tokens, tails=tails)


@dataclass(frozen=True)
class Prompt:
    """The beginning of a prompt: one memory after another, all but the last `tail` tokens loaded;
    with None nothing is loaded, the target reads all of it. In a chat, the ids of the template's
    `head` stand before them."""

    memories: tuple[Resolved, ...]
    tail: int | None
    tenant: str = ""
    caller_salt: str = ""
    head: tuple[int, ...] = ()

    def after(self, head: Sequence[int]) -> Prompt:
        """The same after a chat template's head."""
        return replace(self, head=tuple(head))

    def natively(self) -> Prompt:
        """The same, read by the target itself."""
        return replace(self, tail=None)

    @property
    def skips(self) -> list[int]:
        """How many of each memory's first ids are left out: they only begin prompts."""
        skips = [memory.prefix for memory in self.memories]
        return skips if self.head else [0, *skips[1:]]

    @property
    def ids(self) -> list[int]:
        skipped = zip(self.memories, self.skips, strict=True)
        return [*self.head, *(id for memory, skip in skipped for id in memory.ids[skip:])]

    @property
    def params(self) -> LoadParams | None:
        if self.tail is None:
            return None
        head = [Part(memory=head_name(self.head), tokens=len(self.head))] if self.head else []
        parts = [
            Part(
                memory=memory.memory,
                wmatrix=memory.wmatrix.digest if memory.wmatrix else "",
                skip=skip,
                tokens=len(memory.ids) - skip,
            )
            for memory, skip in zip(self.memories, self.skips, strict=True)
        ]
        return LoadParams(
            parts=(*head, *parts),
            tail=self.tail,
            tenant=self.tenant,
            caller_salt=self.caller_salt,
        )

    @property
    def retention(self) -> list[float | None]:
        """What was measured to be kept of each memory where it stands alone in a prompt; a copy
        keeps all of itself there, and nobody has measured it anywhere else."""
        if self.tail is None:
            return [1.0] * len(self.memories)
        tails = [0] * (len(self.memories) - 1) + [self.tail]
        kept = [m.retention(tail) for m, tail in zip(self.memories, tails, strict=True)]
        moved = range(0 if self.head else 1, len(self.memories))
        return [
            None if i in moved and not self.memories[i].wmatrix else k for i, k in enumerate(kept)
        ]

    def report(self) -> dict[str, Any]:
        """What a response says of the memories that it used."""
        return {
            "ids": [memory.memory for memory in self.memories],
            "plan": "recompute" if self.tail is None else "load",
            "tokens": sum(memory.tokens for memory in self.memories),
            "native_tail": self.tail,
            "retention": self.retention,
        }


def head_name(ids: Sequence[int]) -> str:
    """What a chat template's head is called in the worker: no memory has such an ID."""
    return f"head_{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]}"


class Memories:
    """Resolves memory IDs against stores for one served model. Reads files, never the engine."""

    def __init__(self, config: ServingConfig, model: str, max_model_len: int) -> None:
        self.tail = config.tail
        self.folder = resolve_folder(model)
        self.serve(max_model_len)
        self.prefix = prefix_ids(load_tokenizer(str(self.folder)))
        self.tenants = Tenants.read(Path(config.tenants) if config.tenants else None)
        self.stores = {
            tenant: Store(folder)
            for tenant, folder in self.tenants.stores(Path(config.store)).items()
        }
        # An ID names bytes, which `checked_path` has proven: what they resolve to cannot change.
        self._resolve_once = functools.lru_cache(RESOLVED)(self._resolve)
        self.registry = Registry.read(config.wmatrices)

    def serve(self, max_model_len: int) -> None:
        """Say how many tokens the engine takes: LongRoPE's positions are chosen by it."""
        self.max_model_len = max_model_len
        self.geometry = geometry_of(self.folder, max_model_len)

    def resolve(self, asked: MemoryRequest, tenant: str, caller_salt: str | None = None) -> Prompt:
        """Everything that can be wrong with loading these memories is found here.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt, NoWMatrix, UnsupportedRequest,
            QualityUnreachable
        """
        found = tuple(self.resolve_one(memory, tenant) for memory in asked.ids)
        tail: int | None = min(self.tail, found[-1].tokens) if found[-1].wmatrix else 0
        if asked.quality_target is not None:
            try:
                tail = tail_for(found, asked.quality_target)
            except QualityUnreachable:
                if asked.on_low_quality == "fail":
                    raise
                if asked.on_low_quality == "recompute":
                    tail = None
        return Prompt(found, tail, tenant, caller_salt or "")

    def resolve_one(self, memory_id: object, tenant: str) -> Resolved:
        """One memory of a tenant. Raises as `resolve` does."""
        return self._resolve_once(self.stores[tenant].checked_path(memory_id))

    def _resolve(self, path: Path) -> Resolved:
        manifest = read_manifest(path)
        found = verdict(path.stem, manifest.geometry, self.geometry, self.registry, manifest)
        if found.refusal is not None:
            raise found.refusal
        if found.entry is None:
            ids = read_tokens(path)
            prefix = len(self.prefix) if ids[: len(self.prefix)] == self.prefix else 0
            return Resolved(path.stem, path, None, ids, prefix)
        sink = found.entry.manifest.sink
        ids = prompt_ids(read_text(path), sink, self.folder)
        return Resolved(path.stem, path, found.entry, ids, len(sink))

    def whole(self, prompt: Prompt, own: list[int]) -> list[int]:
        """The memories' ids, then the prompt's own.

        Raises:
            UnsupportedRequest: nothing of its own, or memories that this model cannot move;
            ContextTooLong: it does not fit.
        """
        moved = prompt.memories if prompt.head else prompt.memories[1:]
        if moved and self.geometry.additive and prompt.params:
            raise UnsupportedRequest(
                f"memory {moved[0].memory} cannot stand there",
                found=f"a memory after other tokens, and {self.geometry.name}'s learned positions",
                expected="a prompt that begins with one memory: its states hold where they stand",
                remedy="ask with one memory in /v1/completions",
            )
        ids = prompt.ids
        if not own:
            raise UnsupportedRequest(
                "the prompt is empty",
                found=f"{len(ids)} tokens of memory and none of prompt",
                expected="at least one token to answer",
                remedy="put the question into the prompt",
            )
        names = " ".join(memory.memory for memory in prompt.memories)
        check_fits(f"memory {names}", len(ids), len(own), self.max_model_len)
        return [*ids, *own]

    def without_prefix(self, ids: list[int]) -> list[int]:
        """A prompt's own ids: the tokenizer's prefix stands before the memory already."""
        count = len(self.prefix)
        return ids[count:] if count and ids[:count] == self.prefix else ids


def tail_for(memories: Sequence[Resolved], quality_target: float) -> int:
    """The native tail with which every memory keeps its target; only the last one can have any.

    Raises:
        QualityUnreachable: one of them does not.
    """
    for memory in memories[:-1]:
        memory.plan(quality_target, tails=False)
    plan = memories[-1].plan(quality_target, tails=True)
    return min(plan.tail, memories[-1].tokens) if plan else 0
