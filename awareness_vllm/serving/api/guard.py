"""The guard before every route of the server, vLLM's and those of other plugins: tenants' keys, and
memories on routes that would ignore them."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from awareness_vllm.errors import AwarenessError
from awareness_vllm.serving.api.fields import check_fields
from awareness_vllm.serving.http import FrontEnd, caller, error_response, route_path

OPEN_PATHS = (
    "/health",
    "/ping",
    "/metrics",
    "/load",
    "/version",
    "/docs",
    "/redoc",
    "/openapi.json",
)
"""What probes, scrapers and readers of the API's description ask for without a tenant's key. It
says nothing of anybody's requests but their number."""
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Guard:
    """ASGI middleware; `memory_routes` are the paths whose handlers check their own fields."""

    def __init__(self, app: ASGIApp, memory_routes: Collection[str]) -> None:
        self.app, self.memory_routes = app, memory_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        path = route_path(HTTPConnection(scope))
        try:
            check_key(HTTPConnection(scope), path)
            if takes_fields(scope) and path not in self.memory_routes:
                receive = await checked(scope, receive)
        except AwarenessError as error:
            await error_response(error, path)(scope, receive, send)
        except ClientDisconnect:
            return  # nobody is left to answer
        else:
            with answering(scope):
                await self.app(scope, receive, send)


def answering(scope: Scope) -> AbstractContextManager[None]:
    """Within, editions see that a request is being answered; what only looks is none."""
    front = getattr(HTTPConnection(scope).app.state, "awareness", None)
    if front is None or not takes_fields(scope):
        return nullcontext()
    return cast("FrontEnd", front).editions.activity.request()


def check_key(connection: HTTPConnection, path: str) -> None:
    """Ask for a tenant's key wherever there are tenants, but for OPEN_PATHS.

    Raises:
        Unauthorized
    """
    if path in OPEN_PATHS or path.startswith("/metrics/"):
        return
    if getattr(connection.app.state, "awareness", None) is not None:
        caller(connection)


def takes_fields(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")


async def checked(scope: Scope, receive: Receive) -> Receive:
    """Read a request's body, refuse memories in it, and hand it on as it came.

    Raises:
        UnsupportedRequest
    """
    body = await Request(scope, receive).body()

    def replay() -> Receive:
        replayed = False

        async def once() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return once

    request = Request(scope, replay())
    check_fields(await fields_of(request, body), request.query_params, route_path(request))
    return replay()


async def fields_of(request: Request, body: bytes) -> Any:
    """The fields of a body: of a form their names, else JSON; None where it is neither."""
    try:
        if request.headers.get("content-type", "").startswith(FORMS):
            async with request.form() as form:
                return {name: value for name, value in form.items() if isinstance(value, str)}
        return json.loads(body)
    except (ValueError, RecursionError, HTTPException):
        return None  # vLLM's own error says what is wrong
