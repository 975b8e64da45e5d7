"""`/v1/memories`: what a tenant has in its store, what this server makes of it, what stays warm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from awareness_vllm.compatibility.appraisal import report
from awareness_vllm.compatibility.context import CheckContext, of_manifest
from awareness_vllm.compatibility.models import Model
from awareness_vllm.compatibility.report import CompatibilityReport
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import (
    AwarenessError,
    InvalidMemoryId,
    MemoryNotFound,
    NoWMatrix,
    PackageCorrupt,
    UnsupportedRequest,
)
from awareness_vllm.packages.manifest import Manifest, check_id, read_manifest
from awareness_vllm.packages.store import Store, memory_not_found
from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.http import client_error, memories_of, tenant_of
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import Memories, Prompt
from awareness_vllm.wmatrix.verdict import check_fits

if TYPE_CHECKING:
    from awareness_vllm.serving.api.engine_client import MemoryEngineClient

Found = TypeVar("Found")


class UnauthorizedResponse(BaseModel):
    error: Literal["Unauthorized"]


class Memory(FrozenModel):
    """A package, as its own manifest describes it: nothing is known of one with an `error`."""

    id: str
    object: Literal["memory"] = "memory"
    created: int = Field(description="Unix time at which the package was put into the store")
    bytes: int
    name: str | None = None
    source_model: str | None = None
    tokens: int | None = Field(None, description="Tokens of the source model")
    error: str | None = None


class MemoryList(FrozenModel):
    """A page of the caller's memories, by ID. Bytes are not proven here, but before each use."""

    object: Literal["list"] = "list"
    data: list[Memory]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Compatibility(FrozenModel):
    """What this server's model makes of a memory, used by default and alone in a prompt."""

    loadable: bool
    wmatrix: str | None = Field(None, description="null and loadable: an exact copy")
    prompt_tokens: int | None = None
    retention: float | None = Field(
        None,
        description="1 is as good as the model reading the text itself; null: nobody measured it",
    )
    certified: bool = Field(False, description="Whether the W-Matrix has a certificate")
    reason: str | None = Field(None, description="Why it cannot be loaded")


class MemoryDetail(Memory):
    manifest: Manifest
    compatibility: Compatibility


class MemoryLoad(FrozenModel):
    id: str
    object: Literal["memory.load"] = "memory.load"
    temperature: Literal["cold", "warm"] = Field(description="What the memory was until now")


class MemoryEvicted(FrozenModel):
    id: str
    object: Literal["memory.evicted"] = "memory.evicted"
    evicted: bool = Field(description="Whether it was warm; the package stays in the store")


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Malformed, or this server serves no memories"},
    401: {"model": UnauthorizedResponse, "description": "No API key of one of the tenants"},
    # Instead of the 422 that FastAPI would promise for a wrong parameter: vLLM answers it with 400.
    "default": {"model": ErrorResponse, "description": "Any other error"},
}
ONE_MEMORY_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "The caller has no such memory"},
    422: {"model": ErrorResponse, "description": "A package that cannot be used"},
}
router = APIRouter(prefix="/v1/memories", tags=["memories"], responses=ERRORS)


@router.get("")
async def list_memories(
    raw_request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="ID of the last memory before")] = None,
) -> MemoryList:
    """The caller's memories, in the order of their IDs."""
    with _client_errors("after"):
        return await _ask(raw_request, lambda m, tenant: _page(m.stores[tenant], limit, after))


@router.get("/{memory_id}", responses=ONE_MEMORY_ERRORS)
async def retrieve_memory(memory_id: str, raw_request: Request) -> MemoryDetail:
    """A memory's manifest, and whether this server's model can use it."""
    with _client_errors("memory_id"):
        return await _ask(raw_request, lambda m, tenant: _detail(m, tenant, memory_id))


@router.get("/{memory_id}/compatibility", responses=ONE_MEMORY_ERRORS)
async def check_memory(memory_id: str, raw_request: Request) -> CompatibilityReport:
    """What the memory would be on this model: estimates and their basis, risks, advice."""
    config = cast("TargetConfig", raw_request.app.state.awareness_target)
    with _client_errors("memory_id"):
        return await _ask(raw_request, lambda m, tenant: _report(m, tenant, memory_id, config))


@router.post("/{memory_id}/load", responses=ONE_MEMORY_ERRORS)
async def load_memory(memory_id: str, raw_request: Request) -> MemoryLoad:
    """Align a memory before the first request needs it; answered when it is warm."""
    with _client_errors("memory_id"):
        prompt = await _ask(raw_request, lambda m, tenant: _prompt(m, tenant, memory_id))
        assert prompt.params is not None  # only a quality target can ask for native reading
        found = await _engine_client(raw_request).prefetch(prompt.params)
    return MemoryLoad(id=memory_id, temperature="warm" if found == "warm" else "cold")


@router.delete("/{memory_id}", responses=ONE_MEMORY_ERRORS)
async def evict_memory(memory_id: str, raw_request: Request) -> MemoryEvicted:
    """Take a memory out of the warm tier. The package itself stays where it is."""
    with _client_errors("memory_id"):
        # Its bytes are not proven: a damaged package is all the more reason to let states go.
        await _ask(raw_request, lambda m, tenant: m.stores[tenant].path(memory_id))
    return MemoryEvicted(id=memory_id, evicted=await _engine_client(raw_request).evict(memory_id))


@contextmanager
def _client_errors(parameter: str) -> Iterator[None]:
    """Our errors as those that the HTTP layer answers, with the name of the parameter at fault."""
    try:
        yield
    except AwarenessError as error:
        raise client_error(error, parameter) from error


async def _ask(raw_request: Request, look_up: Callable[[Memories, str], Found]) -> Found:
    """Look something up for the request's tenant, off the event loop."""

    def run() -> Found:
        return look_up(memories_of(raw_request), tenant_of(raw_request))

    return await asyncio.to_thread(run)


def _engine_client(raw_request: Request) -> MemoryEngineClient:
    return cast("MemoryEngineClient", raw_request.app.state.awareness_engine_client)


def _page(store: Store, limit: int, after: str | None) -> MemoryList:
    """The first `limit` memories of a store after one, which need not be there any more."""
    begin = "" if after is None else check_id(after)
    ids = list(islice((found for found in store.ids() if found > begin), limit + 1))
    data = [memory for found in ids[:limit] if (memory := _listed(store, found)) is not None]
    return MemoryList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(ids) > limit,
    )


def _listed(store: Store, memory_id: str) -> Memory | None:
    """A memory's line in the list; None where it went away since its ID was listed."""
    try:
        path = store.path(memory_id)
        try:
            return Memory(**_facts(path, read_manifest(path)))
        except PackageCorrupt as error:
            return Memory(**_facts(path, None), error=error.what)
    except MemoryNotFound:
        return None


def _detail(memories: Memories, tenant: str, memory_id: str) -> MemoryDetail:
    """Everything about one memory. Raises InvalidMemoryId, MemoryNotFound, PackageCorrupt."""
    path = memories.stores[tenant].checked_path(memory_id)
    manifest = read_manifest(path)
    compatibility = _compatibility(memories, tenant, memory_id)
    return MemoryDetail(**_facts(path, manifest), manifest=manifest, compatibility=compatibility)


def _facts(path: Path, manifest: Manifest | None) -> dict[str, Any]:
    """The fields of `Memory` that a file and its manifest give. Raises MemoryNotFound."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise memory_not_found(path.stem) from error
    facts = {"id": path.stem, "created": int(stat.st_mtime), "bytes": stat.st_size}
    if manifest is None:
        return facts
    named = {"name": manifest.name, "source_model": manifest.geometry.name}
    return {**facts, **named, "tokens": manifest.tokens}


def _compatibility(memories: Memories, tenant: str, memory_id: str) -> Compatibility:
    """Whether this server can load a memory, and how. Raises what is the package's own fault."""
    try:
        prompt = _prompt(memories, tenant, memory_id)
        wmatrix = memories.resolve_one(memory_id, tenant).wmatrix
    except (InvalidMemoryId, MemoryNotFound, PackageCorrupt):
        raise
    except AwarenessError as error:
        return Compatibility(loadable=False, reason=str(error))
    return Compatibility(
        loadable=True,
        wmatrix=wmatrix.path.name if wmatrix else None,
        prompt_tokens=len(prompt.ids),
        retention=prompt.retention[0],
        certified=wmatrix is not None and wmatrix.certificate is not None,
    )


def _report(
    memories: Memories, tenant: str, memory_id: str, config: TargetConfig
) -> CompatibilityReport:
    """A memory's report for the served model. Raises what is the package's own fault."""
    path = memories.stores[tenant].checked_path(memory_id)
    manifest = read_manifest(path)
    try:
        tokens = len(memories.resolve_one(memory_id, tenant).ids)
    except (NoWMatrix, UnsupportedRequest):  # the report's verdict says so, too
        tokens = manifest.tokens
    check = CheckContext(
        memory=of_manifest(manifest, memory_id, path),
        target=Model(memories.geometry.name, memories.geometry),
        config=config.model_copy(update={"context_length": memories.max_model_len}),
        registry=memories.registry,
        tokens=tokens,
    )
    return report(check)


def _prompt(memories: Memories, tenant: str, memory_id: str) -> Prompt:
    """A prompt of this memory alone, as it is loaded where a request asks nothing more of it."""
    prompt = memories.resolve(MemoryRequest(ids=(memory_id,)), tenant)
    check_fits(f"memory {memory_id}", len(prompt.ids), 1, memories.max_model_len)
    return prompt
