"""What all our routes share: whose request it is, whose memories, and errors in vLLM's form."""

from __future__ import annotations

from typing import cast

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from vllm.exceptions import (
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)

from awareness_vllm.errors import AwarenessError, Unauthorized, UnsupportedRequest
from awareness_vllm.serving.config import CONNECTOR
from awareness_vllm.serving.request import SHORT
from awareness_vllm.serving.resolver import Memories


def memories_of(raw_request: Request) -> Memories:
    """What this server can load. Raises UnsupportedRequest where it runs without the connector."""
    memories = cast("Memories | None", raw_request.app.state.awareness)
    if memories is None:
        raise UnsupportedRequest(
            "this server serves no memories",
            found="no awareness connector",
            expected=f"--kv-transfer-config with {CONNECTOR}",
            remedy="start the server with `awareness serve`",
        )
    return memories


def tenant_of(raw_request: Request) -> str:
    """The tenant that the request comes from. Raises Unauthorized, and what `memories_of` does."""
    return memories_of(raw_request).tenants.of(raw_request.headers.get("Authorization"))


def client_error(error: AwarenessError, parameter: str = SHORT) -> Exception:
    """Our error as the one that the HTTP layer answers with the same status.

    vLLM has none for 401: `answer_unauthorized` makes the server answer ours.
    """
    if error.status == 401:
        return error
    if error.status == 404:
        return VLLMNotFoundError(str(error))
    if error.status == 422:
        return VLLMUnprocessableEntityError(str(error), parameter=parameter)
    return VLLMValidationError(str(error), parameter=parameter)


def answer_unauthorized(app: FastAPI) -> None:
    """Answer Unauthorized with the body with which vLLM answers a wrong --api-key."""

    async def handler(raw_request: Request, error: Exception) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse({"error": "Unauthorized"}, status_code=401, headers=headers)

    app.add_exception_handler(Unauthorized, handler)
