"""Shared by all our routes: the front end's parts, the caller's tenant, errors and reports in the
form of the API that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from fastapi import FastAPI, Request
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)

from awareness_vllm.errors import (
    AwarenessError,
    RegistryDenied,
    Unauthorized,
    UnsupportedRequest,
)
from awareness_vllm.serving.config import CONNECTOR
from awareness_vllm.serving.request import MEMORY_IDS
from awareness_vllm.serving.tenants import Tenants

if TYPE_CHECKING:
    from awareness_vllm.compatibility.target import TargetConfig
    from awareness_vllm.serving.admission import Admission
    from awareness_vllm.serving.api.canary import Canary
    from awareness_vllm.serving.api.editions import Editions
    from awareness_vllm.serving.api.engine_client import MemoryEngineClient
    from awareness_vllm.serving.resolver import MemoryResolver
    from awareness_vllm.serving.storage import CaptureLimits

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds: most memories are loaded by then."""

ANTHROPIC = "/v1/messages"
"""The paths of Anthropic's API begin so; its clients read errors of another form."""
HEADER = "X-Awareness-"


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
    editions: Editions


class BusyError(GracefulHTTPError):
    """A refusal for now; the response says when to try again."""


def caller(connection: HTTPConnection) -> tuple[FrontEnd, str]:
    """The server's front end, and the tenant that a request comes from.

    Raises:
        UnsupportedRequest: the server runs without the connector;
        Unauthorized: the request has no key of a tenant.
    """
    front = cast("FrontEnd | None", connection.app.state.awareness)
    if front is None:
        raise UnsupportedRequest(
            "this server serves no memories",
            found="no awareness connector",
            expected=f"--kv-transfer-config with {CONNECTOR}",
            remedy="start the server with `awareness serve`",
        )
    headers = connection.headers
    return front, front.tenants.authenticate(headers.get("Authorization"), headers.get("x-api-key"))


def client_error(error: AwarenessError, parameter: str = MEMORY_IDS) -> Exception:
    """An error of ours as the one that vLLM's HTTP layer answers with the same status.

    vLLM has none for 401: `answer_unauthorized` makes the server answer ours.
    """
    if error.status == 401:
        return error
    if error.status == 429:
        return BusyError(str(error), HTTPStatus.TOO_MANY_REQUESTS)
    if isinstance(error, RegistryDenied):  # the server, that is: its client is not at fault
        return GracefulHTTPError(str(error), HTTPStatus.BAD_GATEWAY)
    if error.status in (403, 502, 504, 507):
        return GracefulHTTPError(str(error), HTTPStatus(error.status))
    if error.status == 404:
        return VLLMNotFoundError(str(error))
    kind = VLLMUnprocessableEntityError if error.status == 422 else VLLMValidationError
    return kind(str(error), parameter=error.parameter or parameter)


@contextmanager
def client_errors(parameter: str) -> Iterator[None]:
    """Turn our errors into those of the HTTP layer, with the name of the parameter at fault."""
    try:
        yield
    except AwarenessError as error:
        raise client_error(error, parameter) from error


def error_response(error: AwarenessError, path: str, parameter: str = MEMORY_IDS) -> JSONResponse:
    """The answer to a request that no route has seen, in the form of its path's API."""
    if error.status == 401:
        return unauthorized_response(path)
    made = create_error_response(client_error(error, parameter))
    if path.startswith(ANTHROPIC):
        return translate_error_response(made)
    return JSONResponse(made.model_dump(), made.error.code)


def unauthorized_response(path: str) -> JSONResponse:
    """The 401 of a path's API: Anthropic's, else what vLLM answers to a wrong --api-key."""
    content: dict[str, Any] = {"error": "Unauthorized"}
    if path.startswith(ANTHROPIC):
        error = AnthropicError(type="authentication_error", message="Unauthorized")
        content = AnthropicErrorResponse(error=error).model_dump()
    return JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})


def answer_unauthorized(app: FastAPI) -> None:
    """Have a server answer Unauthorized with 401."""

    async def handler(raw_request: Request, error: Exception) -> JSONResponse:
        return unauthorized_response(route_path(raw_request))

    app.add_exception_handler(Unauthorized, handler)


def route_path(connection: HTTPConnection) -> str:
    """A request's path without the --root-path that a proxy puts before it."""
    scope = connection.scope
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def set_headers(response: Response, values: Mapping[str, str]) -> None:
    """Put a report into headers of ours, X-Awareness-…, which scripts of a web page may read."""
    for name, value in values.items():
        line = " ".join(value.split())
        response.headers[HEADER + name] = line.encode("ascii", "replace").decode()
    names = [HEADER + name for name in values]
    exposed = response.headers.get("Access-Control-Expose-Headers")
    response.headers["Access-Control-Expose-Headers"] = ", ".join(filter(None, [exposed, *names]))


def is_whole_answer(response: Response | None) -> TypeGuard[Response]:
    """Whether a response is an answer in JSON, and no stream. vLLM 0.33 makes it a plain Response,
    as it does an empty one for a client that has gone."""
    return (
        response is not None
        and response.status_code == 200
        and response.media_type == JSONResponse.media_type
        and not isinstance(response, StreamingResponse)
    )


def replace_body(response: Response, body: Any) -> None:
    """Give a response another body. All else stays: its status, its headers, and the task that
    vLLM runs after it (the gauge of --enable-server-load-tracking counts by it)."""
    response.body = bytes(JSONResponse(body).body)
    response.headers["Content-Length"] = str(len(response.body))


def answer_busy(app: FastAPI) -> None:
    """Answer a refusal for now as vLLM does its errors, and say when to try again."""

    async def handler(raw_request: Request, error: Exception) -> JSONResponse:
        body = create_error_response(error)
        return JSONResponse(body.model_dump(), status_code=body.error.code, headers=RETRY_AFTER)

    app.add_exception_handler(BusyError, handler)
