"""Shared by all our routes: the front end's parts, the caller's tenant, errors in vLLM's form."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)

from awareness_vllm.errors import AwarenessError, Unauthorized, UnsupportedRequest
from awareness_vllm.serving.config import CONNECTOR
from awareness_vllm.serving.request import MEMORY_IDS
from awareness_vllm.serving.tenants import Tenants

if TYPE_CHECKING:
    from awareness_vllm.compatibility.target import TargetConfig
    from awareness_vllm.serving.admission import Admission
    from awareness_vllm.serving.api.canary import Canary
    from awareness_vllm.serving.api.engine_client import MemoryEngineClient
    from awareness_vllm.serving.resolver import MemoryResolver
    from awareness_vllm.serving.storage import CaptureLimits

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds: most memories are loaded by then."""


@dataclass(frozen=True)
class FrontEnd:
    """The parts of a server's front end, as `app.state.awareness`; `target` says how the model is
    served, for reports about memories."""

    resolver: MemoryResolver
    tenants: Tenants
    engine_client: MemoryEngineClient
    target: TargetConfig
    canary: Canary
    admission: Admission
    capture_limits: CaptureLimits


class BusyError(GracefulHTTPError):
    """A refusal for now; the response says when to try again."""


def caller(raw_request: Request) -> tuple[FrontEnd, str]:
    """The server's front end, and the tenant that a request comes from.

    Raises:
        UnsupportedRequest: the server runs without the connector;
        Unauthorized: the request has no key of a tenant.
    """
    front = cast("FrontEnd | None", raw_request.app.state.awareness)
    if front is None:
        raise UnsupportedRequest(
            "this server serves no memories",
            found="no awareness connector",
            expected=f"--kv-transfer-config with {CONNECTOR}",
            remedy="start the server with `awareness serve`",
        )
    return front, front.tenants.authenticate(raw_request.headers.get("Authorization"))


def client_error(error: AwarenessError, parameter: str = MEMORY_IDS) -> Exception:
    """An error of ours as the one that vLLM's HTTP layer answers with the same status.

    vLLM has none for 401: `answer_unauthorized` makes the server answer ours.
    """
    if error.status == 401:
        return error
    if error.status == 429:
        return BusyError(str(error), HTTPStatus.TOO_MANY_REQUESTS)
    if error.status in (403, 507):
        return GracefulHTTPError(str(error), HTTPStatus(error.status))
    if error.status == 404:
        return VLLMNotFoundError(str(error))
    kind = VLLMUnprocessableEntityError if error.status == 422 else VLLMValidationError
    return kind(str(error), parameter=parameter)


def answer_unauthorized(app: FastAPI) -> None:
    """Answer Unauthorized with the body with which vLLM answers a wrong --api-key."""

    async def handler(raw_request: Request, error: Exception) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse({"error": "Unauthorized"}, status_code=401, headers=headers)

    app.add_exception_handler(Unauthorized, handler)


def answer_busy(app: FastAPI) -> None:
    """Answer a refusal for now as vLLM does its errors, and say when to try again."""

    async def handler(raw_request: Request, error: Exception) -> JSONResponse:
        body = create_error_response(error)
        return JSONResponse(body.model_dump(), status_code=body.error.code, headers=RETRY_AFTER)

    app.add_exception_handler(BusyError, handler)
