"""What no route may pass on: memories that it would ignore, and what the engine would die of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.request import LONG, SHORT

IGNORANT = ("/invocations", "/v1/chat/completions/batch", "/inference/v1/generate")
"""vLLM's other routes that take a prompt."""
DEEPEST = 32
"""vLLM hands a request's own parameters to its engine by recursion: at 500 levels stock vLLM 0.32
dies of one request."""


def check_carried(name: str, value: object) -> None:
    """Refuse what vLLM takes from a request as it is and cannot hand to its engine.

    Raises:
        UnsupportedRequest: nested too deep, or text that is not Unicode.
    """
    level = [value]
    for _ in range(DEEPEST):
        if any(not _is_unicode(one) for one in level):
            raise _refused(name, "text that is not Unicode", "Unicode")
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise _refused(name, f"more than {DEEPEST} levels", "at most so many")


def _inside(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(value: object) -> bool:
    return (
        not isinstance(value, str)
        or value.isascii()
        or value.encode(errors="ignore").decode() == value
    )


def _refused(name: str, found: str, expected: str) -> UnsupportedRequest:
    return UnsupportedRequest(
        f"{name} cannot be handed to the engine",
        found=found,
        expected=expected,
        remedy=f"send less in {name}",
    )


def refuse_memories(app: FastAPI) -> None:
    """Answer memories on a route that knows nothing of them with a 400: it would ignore them."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path in IGNORANT:
            route.app = _refusing(route.app, route.path)


def _refusing(inner: ASGIApp, path: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if _names_memories(body):
            message = (
                f"{path} knows nothing of {SHORT} or {LONG}: use /v1/completions or a chat API"
            )
            error = {"message": message, "type": "BadRequestError", "param": SHORT, "code": 400}
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await inner(scope, again, send)

    return app


def _names_memories(body: bytes) -> bool:
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return False  # vLLM says what is wrong with it
    return isinstance(found, dict) and any(found.get(field) is not None for field in (SHORT, LONG))
