"""Capture on a running server: the prompt that it has just computed becomes a memory package."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from awareness_vllm.errors import (
    CaptureNotAllowed,
    ContextTooLong,
    SignatureInvalid,
    UnsupportedRequest,
)
from awareness_vllm.models.tokens import Tokens
from awareness_vllm.packages.capture import tokens_of
from awareness_vllm.packages.file import publish, read_index
from awareness_vllm.packages.manifest import Manifest, refusing
from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.admission import Admitted
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.http import FrontEnd, caller, is_whole_answer, replace_body, set_headers
from awareness_vllm.serving.offline_capture import as_package, state_bytes
from awareness_vllm.serving.request import MEMORY
from awareness_vllm.tensor_file import opened

CHUNK = 1 << 20
"""Bytes of a package's file that are sent at once."""


@dataclass(frozen=True)
class Capture:
    """A prompt that the engine reads back under `key`, to be published as `name`."""

    front: FrontEnd
    tenant: str
    name: str
    text: str
    tokens: Tokens
    key: str
    load: Admitted

    async def finish(self, answer: Awaitable[Response | None]) -> Response | None:
        """The response, with the ID under which its prompt can be used from now on.

        Raises:
            StorageFull; AwarenessError: its states were not read back.
        """
        engine_client = self.front.engine_client
        try:
            response = await answer
            if not is_whole_answer(response):
                return response
            try:
                states = await engine_client.captured_states(self.key)
                published = await asyncio.to_thread(self._publish, states)
            except BaseException:
                if response.background is not None:
                    await response.background()  # vLLM counts on it, whatever is answered instead
                raise
        finally:
            # Whatever is left of it: the client may be gone at any moment.
            self.load.end()
            await asyncio.shield(engine_client.discard(self.key))
        body = json.loads(bytes(response.body))
        body[MEMORY] = {"id": published.stem, "name": self.name, "tokens": len(self.tokens.ids)}
        replace_body(response, body)
        set_headers(response, {"Captured": published.stem})
        return response

    def _publish(self, states: dict[str, Any]) -> Path:
        return _published(self.front, self.tenant, self.text, self.tokens, states, self.name)


async def announce_capture(request: object, raw_request: Request, name: str) -> Capture:
    """Have the engine read a request's prompt back.

    Raises:
        CaptureNotAllowed; UnsupportedRequest: more than one plain text; BadInput: an empty one;
        ContextTooLong: it does not fit; TooManyLoads; StorageFull.
    """
    front, tenant = caller(raw_request)
    _check_allowed(front, f"{MEMORY}.capture")
    if not isinstance(request, CompletionRequest) or not isinstance(request.prompt, str):
        raise _refused("another prompt", "/v1/completions with one prompt of text")
    if request.stream:
        raise _refused("a stream, which cannot carry the ID", "stream: false")
    if request.n not in (None, 1):
        raise _refused(f"n: {request.n}", "n: 1")
    text = request.prompt
    tokens, load = await _admitted(front, tenant, text)
    try:
        key = await front.engine_client.announce(to_file=True)
    except BaseException:
        load.end()
        raise
    request.prompt = tokens.ids
    request.add_special_tokens = False
    if any(layer.window for layer in front.resolver.model.geometry.layers):
        # Of what the prefix cache brought, layers with windows would not hold all.
        request.cache_salt = f"awareness-capture-{key}"
    request.kv_transfer_params = {**(request.kv_transfer_params or {}), CAPTURE_KEY: key}
    return Capture(front, tenant, name, text, tokens, key, load)


async def capture_edition(
    front: FrontEnd, tenant: str, memory_id: str
) -> tuple[str, Manifest, Tokens]:
    """Publish what the served model makes of a memory's text as a memory of its own: its ID, the
    original's manifest, and its tokens.

    Raises:
        CaptureNotAllowed, InvalidMemoryId, MemoryNotFound, PackageTooLarge, PackageCorrupt,
        SignatureInvalid; UnsupportedRequest: no text, or states of this model already;
        ContextTooLong, TooManyLoads, StorageFull; AwarenessError: its states were not read back.
    """
    _check_allowed(front, "an edition")
    (await front.admission.admit(tenant, [memory_id])).end()  # here, whence ever it comes
    package = await asyncio.to_thread(front.resolver.check, memory_id, tenant)
    if isinstance(package.use, SignatureInvalid):
        raise package.use
    manifest = package.manifest
    own = manifest.geometry.same_model(front.resolver.model.geometry)
    if not manifest.has_text or (own and package.origin != "claimed"):
        raise UnsupportedRequest(
            f"memory {memory_id} has no edition by this model",
            found="this model's own states" if own else "a package without text",
            expected="another model's memory, with its text",
        )
    index = await asyncio.to_thread(read_index, package.path, digest=digest_in(memory_id))
    tokens, load = await _admitted(front, tenant, index.text)
    with load:
        key = await front.engine_client.read(tokens.ids, to_file=True)
        try:
            states = await front.engine_client.captured_states(key)
        finally:
            await asyncio.shield(front.engine_client.discard(key))
        name, text = manifest.name, index.text
        published = await asyncio.to_thread(
            _published, front, tenant, text, tokens, states, name, edition_of=memory_id
        )
    return published.stem, manifest, tokens


def captured_file(front: FrontEnd, tenant: str, memory_id: str) -> StreamingResponse:
    """The bytes of a package in a tenant's own store that was captured under this server's home.
    Whoever fetches them has their digest in the ID.

    Raises:
        CaptureNotAllowed, InvalidMemoryId, MemoryNotFound, PackageCorrupt; UnsupportedRequest: a
        package that came by other means, of which the operator alone may dispose.
    """
    _check_allowed(front, "a package's file")
    package = front.resolver.check(memory_id, tenant)
    pulled = front.resolver.stores[tenant].is_pulled(memory_id)
    if pulled or package.origin != "own":
        raise UnsupportedRequest(
            f"the file of memory {memory_id} cannot be fetched",
            found="one of the registry" if pulled else f"a package that is {package.origin}",
            expected="one that was captured on this server",
            remedy="fetch it from where it came",
        )
    with refusing(package.path), contextlib.ExitStack() as stack:
        file, size = stack.enter_context(opened(package.path))
        held = stack.pop_all()

    def chunks() -> Iterator[bytes]:
        with held:
            while chunk := file.read(CHUNK):
                yield chunk

    headers = {"Content-Length": str(size)}
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)


def _check_allowed(front: FrontEnd, what: str) -> None:
    """Raises CaptureNotAllowed."""
    if not front.capture_limits.allowed:
        raise CaptureNotAllowed(
            "this server captures no prompts",
            found=what,
            expected="a server whose operator allows it",
            remedy="start the server with --allow-capture, or use `awareness capture`",
        )


async def _admitted(front: FrontEnd, tenant: str, text: str) -> tuple[Tokens, Admitted]:
    """The server's own tokens of a text, where each of them lies in it, and room for their states.

    Raises:
        BadInput: an empty text; ContextTooLong: it does not fit; TooManyLoads; StorageFull.
    """
    model = front.resolver.model
    tokens = await asyncio.to_thread(tokens_of, model.folder, text)
    if len(tokens.ids) >= (limit := model.max_model_len):
        raise ContextTooLong(
            "the text to capture does not fit",
            found=f"{len(tokens.ids)} tokens",
            expected=f"fewer than {limit} (max_model_len)",
            remedy="split the text into several memories, or start the server with a larger "
            "--max-model-len",
        )
    size = state_bytes(model.geometry, len(tokens.ids), model.dtype)
    folder = front.resolver.stores[tenant].folder
    await asyncio.to_thread(front.capture_limits.check, folder, size)
    return tokens, await front.admission.admit_capture(secrets.token_hex(16), size)


def _published(
    front: FrontEnd,
    tenant: str,
    text: str,
    tokens: Tokens,
    states: dict[str, Any],
    name: str | None,
    *,
    edition_of: str | None = None,
) -> Path:
    """The file of a new package in a tenant's store. Raises StorageFull."""
    geometry, folder = front.resolver.model.geometry, front.resolver.stores[tenant].folder
    package = as_package(geometry, text, tokens, states, name, edition_of)
    size = sum(state.numel() * state.element_size() for state in states.values())
    return front.capture_limits.publish(folder, size, lambda: publish(package, folder))


def _refused(found: str, expected: str) -> UnsupportedRequest:
    return UnsupportedRequest(
        "this prompt cannot be captured",
        found=found,
        expected=expected,
        remedy="send the text alone, or use `awareness capture`",
    )
