"""Which of a server's routes answers a path: the first that matches, whoever has attached it."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match

from awareness_vllm.errors import UnsupportedServer


def check_routes(app: FastAPI, ours: Iterable[BaseRoute]) -> None:
    """Refuse a server in which another route is the first to match the path of one of `ours`: it
    would ignore memories in silence, as vLLM's own does before 0.32.

    Raises:
        UnsupportedServer
    """
    for route in ours:
        assert isinstance(route, APIRoute)
        for method in route.methods:
            scope = {"type": "http", "method": method, "path": route.path, "headers": []}
            first = next((one for one in app.routes if one.matches(scope)[0] is Match.FULL), None)
            if getattr(first, "endpoint", None) is not route.endpoint:
                raise UnsupportedServer(
                    f"another route answers {method} {route.path}: it would ignore memories",
                    found=first or "none of awareness-vllm",
                    expected="the route of awareness-vllm before it",
                    remedy="leave the plugin that attaches it out of VLLM_PLUGINS",
                )
