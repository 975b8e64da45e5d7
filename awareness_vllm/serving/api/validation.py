"""Checks before the engine: extras that would kill it, memories on routes that ignore them."""

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
from awareness_vllm.serving.request import MEMORY, MEMORY_IDS

OTHER_ROUTES = ("/invocations", "/v1/chat/completions/batch", "/inference/v1/generate")
"""vLLM's routes that take a prompt and know no memories."""
MAX_DEPTH = 32
"""vLLM hands a request's own parameters to its engine by recursion: at 500 levels stock vLLM 0.32
dies of one request."""


def check_engine_extras(name: str, value: object) -> None:
    """Refuse extras that vLLM takes from a request as they are and cannot hand to its engine.

    Raises:
        UnsupportedRequest: nested too deep, or text that is not Unicode.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        if not all(_is_unicode(one) for one in level):
            raise _refused(name, "text that is not Unicode", "Unicode")
        level = [inner for one in level for inner in _children(one)]
        if not level:
            return
    raise _refused(name, f"more than {MAX_DEPTH} levels", f"at most {MAX_DEPTH}")


def _children(value: object) -> list[object]:
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
    """Answer memories with a 400 on routes that would ignore them."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path in OTHER_ROUTES:
            route.app = _refusing(route.app, route.path)


def _refusing(inner: ASGIApp, path: str) -> ASGIApp:
    message = f"{path} takes no {MEMORY_IDS} or {MEMORY}: use /v1/completions or a chat API"
    error = {"message": message, "type": "BadRequestError", "param": MEMORY_IDS, "code": 400}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if _names_memories(body):
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await inner(scope, replay, send)

    return app


def _names_memories(body: bytes) -> bool:
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return False  # vLLM's own error says what is wrong
    return isinstance(fields, dict) and any(
        fields.get(field) is not None for field in (MEMORY_IDS, MEMORY)
    )
