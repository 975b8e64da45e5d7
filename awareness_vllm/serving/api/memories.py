"""`/v1/memories`: the packages in a tenant's store, their use on this server, the warm tier.

Stores are read off the event loop: in FastAPI's threads, where a route is a plain function.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from awareness_vllm.compatibility.appraisal import report
from awareness_vllm.compatibility.context import CheckContext, of_manifest
from awareness_vllm.compatibility.models import Model
from awareness_vllm.compatibility.report import CompatibilityReport
from awareness_vllm.errors import (
    AwarenessError,
    InvalidMemoryId,
    MemoryNotFound,
    PackageCorrupt,
    SignatureInvalid,
)
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import Manifest, check_id, read_manifest
from awareness_vllm.packages.store import Store, digest_in, memory_not_found
from awareness_vllm.serving.api.capture import capture_edition, captured_file
from awareness_vllm.serving.api.prefetch import while_connected
from awareness_vllm.serving.api.protocol import (
    Compatibility,
    Memory,
    MemoryDetail,
    MemoryEdition,
    MemoryEvicted,
    MemoryList,
    MemoryLoad,
    UnauthorizedResponse,
)
from awareness_vllm.serving.http import FrontEnd, caller, client_errors
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.registry import Offer
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.wmatrix.registry import WMatrixEntry
from awareness_vllm.wmatrix.verdict import check_fits

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
CLIENT_GONE = 499
"""A status that nobody sees: for the server's log."""
router = APIRouter(prefix="/v1/memories", tags=["memories"], responses=ERRORS)


@router.get("")
def list_memories(
    raw_request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="ID of the last memory before")] = None,
) -> MemoryList:
    """The caller's memories, in the order of their IDs."""
    with client_errors("after"):
        front, tenant = caller(raw_request)
        return _page(front, tenant, limit, after)


@router.get("/{memory_id}", responses=ONE_MEMORY_ERRORS)
async def retrieve_memory(memory_id: str, raw_request: Request) -> MemoryDetail:
    """A memory's manifest, and whether this server's model can use it. Of one in the registry the
    listing says it: nothing is pulled."""
    with client_errors("memory_id"):
        front, tenant = caller(raw_request)
        offer = await front.admission.offer(tenant, memory_id)
        if offer is not None:
            return _offered(front, offer.listing)
        return await asyncio.to_thread(_detail, front, tenant, memory_id)


@router.get("/{memory_id}/compatibility", responses=ONE_MEMORY_ERRORS)
async def check_memory(memory_id: str, raw_request: Request) -> CompatibilityReport:
    """The memory on this model: estimates and their basis, risks, advice. Of one in the registry by
    its listing: nothing is pulled."""
    with client_errors("memory_id"):
        front, tenant = caller(raw_request)
        offer = await front.admission.offer(tenant, memory_id)
        return await asyncio.to_thread(_report, front, tenant, memory_id, offer)


@router.get("/{memory_id}/package", responses=ONE_MEMORY_ERRORS, response_class=StreamingResponse)
def fetch_package(memory_id: str, raw_request: Request) -> StreamingResponse:
    """The file of a memory that was captured on this server, where captures are allowed."""
    with client_errors("memory_id"):
        return captured_file(*caller(raw_request), memory_id)


@router.post("/{memory_id}/load", responses=ONE_MEMORY_ERRORS, response_model=MemoryLoad)
async def load_memory(memory_id: str, raw_request: Request) -> Any:
    """Align a memory before the first request needs it; answered when it is warm."""
    load = await while_connected(raw_request, _load(memory_id, raw_request))
    return load or Response(status_code=CLIENT_GONE)


async def _load(memory_id: str, raw_request: Request) -> MemoryLoad:
    with client_errors("memory_id"):
        front, tenant = caller(raw_request)
        with await front.admission.admit(tenant, [memory_id]):
            prompt = await asyncio.to_thread(_prompt, front, tenant, memory_id)
            assert prompt.params is not None  # only a quality target can ask for native reading
            await front.canary.check(prompt)
            prompt = await front.editions.use(prompt)
            assert prompt.params is not None
            temperature = await front.engine_client.prefetches.run(prompt.params)
    return MemoryLoad(id=memory_id, temperature="warm" if temperature == "warm" else "cold")


@router.post("/{memory_id}/edition", responses=ONE_MEMORY_ERRORS, response_model=MemoryEdition)
async def publish_edition(memory_id: str, raw_request: Request) -> Any:
    """Have the model read a memory's text now, and publish its own states of it as a memory in the
    caller's store, with a link to the original: exact for every server of this model."""
    made = await while_connected(raw_request, _edition(memory_id, raw_request))
    return made or Response(status_code=CLIENT_GONE)


async def _edition(memory_id: str, raw_request: Request) -> MemoryEdition:
    with client_errors("memory_id"):
        front, tenant = caller(raw_request)
        published, original, tokens = await capture_edition(front, tenant, memory_id)
    return MemoryEdition(
        id=published, edition_of=memory_id, name=original.name, tokens=len(tokens.ids)
    )


@router.delete("/{memory_id}", responses=ONE_MEMORY_ERRORS)
async def evict_memory(memory_id: str, raw_request: Request) -> MemoryEvicted:
    """Give up the caller's use of a memory: without other tenants' it leaves the warm tier, unless
    it is pinned. The package itself stays where it is."""
    with client_errors("memory_id"):
        front, tenant = caller(raw_request)
        # Without a check of its bytes: a damaged package is all the more reason to drop states.
        if not await asyncio.to_thread(front.resolver.stores[tenant].has, memory_id):
            await front.admission.offer(tenant, memory_id)  # its file may have left the cache
    front.admission.forget(memory_id)
    front.editions.forget(memory_id)
    evicted = await front.engine_client.evict(memory_id, tenant)
    return MemoryEvicted(id=memory_id, evicted=evicted)


def _page(front: FrontEnd, tenant: str, limit: int, after: str | None) -> MemoryList:
    """A tenant's first `limit` memories after one, which need not be there any more."""
    store, pulls = front.resolver.stores[tenant], front.admission.pulls
    begin = "" if after is None else check_id(after)
    used = sorted(pulls.used_by(tenant)) if pulls else []
    pulled = (one for one in used if store.has(one) and store.is_pulled(one))
    ids = heapq.merge(store.ids(), pulled)
    listed = (_listed(front, store, one) for one in ids if one > begin)
    more = list(islice((memory for memory in listed if memory is not None), limit + 1))
    data = more[:limit]
    return MemoryList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(more) > limit,
    )


def _listed(front: FrontEnd, store: Store, memory_id: str) -> Memory | None:
    """A memory's line in the list; None where it went away since its ID was listed."""
    trust, edition = front.resolver.trust, front.editions.has(memory_id)
    try:
        path = store.path(memory_id)
        try:
            signed_by = trust.signer(path, digest_in(memory_id), "package")
            facts = _facts(store, path, read_manifest(path))
            return Memory(**facts, signed_by=signed_by, edition=edition)
        except (PackageCorrupt, SignatureInvalid) as error:
            return Memory(**_facts(store, path, None), edition=edition, error=error.what)
    except MemoryNotFound:
        return None


def _detail(front: FrontEnd, tenant: str, memory_id: str) -> MemoryDetail:
    """Everything about one memory. Raises InvalidMemoryId, MemoryNotFound, PackageCorrupt."""
    package = front.resolver.check(memory_id, tenant)
    facts = _facts(front.resolver.stores[tenant], package.path, package.manifest)
    compatibility = _compatibility(front, tenant, memory_id)
    return MemoryDetail(
        **facts,
        signed_by=package.signed_by,
        edition=front.editions.has(memory_id),
        manifest=package.manifest,
        compatibility=compatibility,
    )


def _facts(store: Store, path: Path, manifest: Manifest | None) -> dict[str, Any]:
    """The fields of `Memory` from a file and its manifest. Raises MemoryNotFound."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise memory_not_found(path.stem) from error
    facts = {"id": path.stem, "created": int(stat.st_mtime), "bytes": stat.st_size}
    facts["location"] = "store" if path.parent == store.folder else "cache"
    return facts if manifest is None else facts | _named(manifest)


def _named(manifest: Manifest) -> dict[str, Any]:
    """The fields of `Memory` from a manifest."""
    named = {"name": manifest.name, "source_model": manifest.geometry.name}
    named["edition_of"] = manifest.edition_of
    named["latent_of"] = manifest.latent.package if manifest.latent else None
    return {**named, "tokens": manifest.tokens}


def _offered(front: FrontEnd, listing: PackageListing) -> MemoryDetail:
    """Everything that the registry says about a memory. What it keeps depends on its text."""
    try:
        decision = front.resolver.check_listing(listing)
        compatibility = Compatibility(loadable=True, **_map_facts(decision.entry))
    except AwarenessError as error:
        compatibility = Compatibility(loadable=False, reason=str(error))
    return MemoryDetail(
        id=listing.id,
        bytes=listing.bytes,
        location="registry",
        **_named(listing.manifest),
        manifest=listing.manifest,
        compatibility=compatibility,
    )


def _compatibility(front: FrontEnd, tenant: str, memory_id: str) -> Compatibility:
    """Whether this server can load a memory, and how. Raises for faults of the package itself."""
    try:
        prompt = _prompt(front, tenant, memory_id)
    except (InvalidMemoryId, MemoryNotFound, PackageCorrupt):
        raise
    except AwarenessError as error:
        return Compatibility(loadable=False, reason=str(error))
    return Compatibility(
        loadable=True,
        prompt_tokens=prompt.memories[0].tokens,
        **vars(prompt.promises[0]),
        **_map_facts(prompt.memories[0].wmatrix),
    )


def _map_facts(wmatrix: WMatrixEntry | None) -> dict[str, Any]:
    """The fields of `Compatibility` from the map, if it takes one."""
    if wmatrix is None:
        return {}
    return {
        "wmatrix": wmatrix.path.name,
        "certified": wmatrix.certificate is not None,
        "claimed": wmatrix.claimed,
        "wmatrix_signed_by": wmatrix.signed_by,
        "certificate_signed_by": wmatrix.certificate_signed_by,
    }


def _report(
    front: FrontEnd, tenant: str, memory_id: str, offer: Offer | None
) -> CompatibilityReport:
    """A memory's report for the served model: by its package, or by what the registry lists. Raises
    for faults of the package itself."""
    resolver = front.resolver
    if offer is not None:
        manifest, use = offer.listing.manifest, None
        memory = of_manifest(manifest, memory_id)
    else:
        package = resolver.check(memory_id, tenant)
        manifest, use = package.manifest, package.use
        memory = of_manifest(manifest, memory_id, package.path, package.signed_by)
    check = CheckContext(
        memory=memory,
        target=Model(resolver.model.geometry.name, resolver.model.geometry),
        config=front.target,
        registry=resolver.registry,
        # Where the memory is refused, the report's verdict says so, too.
        tokens=len(use.ids) if isinstance(use, ResolvedMemory) else memory.tokens,
        refused=use if isinstance(use, SignatureInvalid) else None,
    )
    return report(check)


def _prompt(front: FrontEnd, tenant: str, memory_id: str) -> Prompt:
    """A prompt of this memory alone, loaded as a request without further wishes has it."""
    prompt = front.resolver.resolve(MemoryRequest(ids=(memory_id,)), tenant)
    limit = front.resolver.model.max_model_len
    check_fits(f"memory {memory_id}", len(prompt.ids), 1, limit)
    return prompt
