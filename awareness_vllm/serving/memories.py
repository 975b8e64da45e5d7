"""What a server can load: its store, its W-Matrices and its own model, asked by memory ID."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from awareness_vllm.align.aligner import prompt_ids
from awareness_vllm.anchors.spans import load_tokenizer, prefix_ids
from awareness_vllm.errors import NoWMatrix, UnsupportedRequest
from awareness_vllm.geometry import Geometry, Strict, resolve_folder
from awareness_vllm.packages.file import read_manifest, read_text, read_tokens
from awareness_vllm.serving.config import PARAMS_KEY, ServingConfig
from awareness_vllm.store.folder import Store
from awareness_vllm.wmatrix.file import WMatrixManifest, digest_of
from awareness_vllm.wmatrix.file import read_manifest as read_wmatrix_manifest

RESOLVED = 1024
"""Memories whose prompt ids are kept, so that a hot request does not tokenize them again."""


class LoadParams(Strict):
    """What a request tells the connector, under `kv_transfer_params["awareness"]`: of the prompt's
    first `tokens` ids, all but the last `tail` come from the memory."""

    memory: str
    wmatrix: str = ""
    tokens: int
    tail: int = Field(0, ge=0)
    caller_salt: str = ""

    @property
    def cache_salt(self) -> str:
        """Aligned KV is approximate: it shares cached blocks with nothing but the same memory,
        through the same map, for the same caller."""
        parts = json.dumps([self.memory, self.wmatrix, self.tail, self.caller_salt])
        return f"awareness-{hashlib.sha256(parts.encode()).hexdigest()}"

    @classmethod
    def of(cls, kv_transfer_params: object, cache_salt: str | None) -> LoadParams | None:
        """The parameters of a request that our endpoint expanded, or None.

        A client can write any `kv_transfer_params`; without the salt that belongs to them they
        are ignored, so that nobody can place approximate KV where exact KV is looked up.
        """
        if not isinstance(kv_transfer_params, Mapping) or PARAMS_KEY not in kv_transfer_params:
            return None
        try:
            params = cls.model_validate(kv_transfer_params[PARAMS_KEY])
        except ValidationError:
            return None
        return params if params.tokens > 0 and params.cache_salt == cache_salt else None


@dataclass(frozen=True)
class Resolved:
    """A memory that this server can load: its file, the map (None: a copy), its prompt ids, and how
    many of the last ones are left to the target."""

    memory: str
    path: Path
    wmatrix: WMatrixEntry | None
    ids: list[int]
    tail: int

    def params(self, caller_salt: str | None) -> LoadParams:
        return LoadParams(
            memory=self.memory,
            wmatrix=self.wmatrix.digest if self.wmatrix else "",
            tokens=len(self.ids),
            tail=self.tail,
            caller_salt=caller_salt or "",
        )


@dataclass(frozen=True)
class WMatrixEntry:
    """A W-Matrix file that this server was given."""

    path: Path
    manifest: WMatrixManifest
    digest: str


class Memories:
    """Resolves memory IDs against a store for one served model. Reads files, never the engine."""

    def __init__(self, config: ServingConfig, model: str, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.tail = config.tail
        self.folder = resolve_folder(model)
        self.geometry = Geometry.from_folder(self.folder)
        self.prefix = prefix_ids(load_tokenizer(str(self.folder)))
        self.store = Store(Path(config.store))
        # An ID names bytes, which `checked_path` has proven: what they resolve to cannot change.
        self._resolve_once = functools.lru_cache(RESOLVED)(self._resolve)
        self.wmatrices = [
            WMatrixEntry(Path(p), read_wmatrix_manifest(Path(p)), digest_of(Path(p)))
            for p in config.wmatrices
        ]

    def resolve(self, memory_id: object) -> Resolved:
        """Everything that can be wrong with loading this memory is found here.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt, NoWMatrix, UnsupportedRequest
        """
        return self._resolve_once(self.store.checked_path(memory_id))

    def _resolve(self, path: Path) -> Resolved:
        manifest = read_manifest(path)
        source = manifest.geometry
        if not manifest.has_text:
            raise UnsupportedRequest(
                f"memory {path.stem} has no text",
                found="a package captured without text",
                expected="one whose text this server could read itself, should a load fail",
                remedy="capture it with its text",
            )
        if source.same_model(self.geometry):
            return Resolved(path.stem, path, None, read_tokens(path), tail=0)
        entry = self.wmatrix_for(path.stem, source)
        ids = prompt_ids(read_text(path), entry.manifest.sink, self.folder)
        return Resolved(path.stem, path, entry, ids, min(self.tail, len(ids) - 1))

    def wmatrix_for(self, memory_id: str, source: Geometry) -> WMatrixEntry:
        """The W-Matrix from a source model to the served one. Raises NoWMatrix."""
        from_source = [
            e
            for e in self.wmatrices
            if e.manifest.source.same_model(source) and e.manifest.reads_tokens
        ]
        for entry in from_source:
            if entry.manifest.target.same_model(self.geometry):
                return entry
        other = [f"{e.path.name} leads to {e.manifest.target.name}" for e in from_source]
        known = [f"{e.manifest.source.name} → {e.manifest.target.name}" for e in self.wmatrices]
        raise NoWMatrix(
            f"memory {memory_id} was captured on {source.name}, "
            f"this server runs {self.geometry.name}",
            found="; ".join(other) or f"W-Matrices {known or 'none'}",
            expected=f"a W-Matrix {source.name} → {self.geometry.name} for these exact weights",
            remedy="fit one with `awareness fit` and start the server with --wmatrix FILE",
        )

    def without_prefix(self, ids: list[int]) -> list[int]:
        """A prompt's own ids: the tokenizer's prefix stands before the memory already."""
        count = len(self.prefix)
        return ids[count:] if count and ids[:count] == self.prefix else ids


def kv_transfer_params(params: LoadParams, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The request field that carries our parameters to the connector."""
    return {**(extra or {}), PARAMS_KEY: params.model_dump()}
