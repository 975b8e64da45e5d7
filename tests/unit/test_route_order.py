"""A server starts only if our routes answer at our paths: another one would ignore memories."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount
from vllm.config import KVTransferConfig, VllmConfig
from vllm.plugins.endpoint_plugins import interface

from awareness_vllm.errors import BadInput, UnsupportedServer
from awareness_vllm.serving.api import memories as memory_routes
from awareness_vllm.serving.api.route_order import check_routes
from awareness_vllm.serving.api.routes import AwarenessEndpoints, router
from awareness_vllm.serving.config import CONNECTOR, CONNECTOR_MODULE

pytestmark = pytest.mark.unit

OURS = [*router.routes, *memory_routes.router.routes]
PATHS = [cast(APIRoute, route).path for route in OURS]


class Other:
    """A plugin with a route of ours, or with all paths."""

    name, required_tasks = "other", None

    def __init__(self, path: str) -> None:
        self.path = path

    def attach_router(self, app: FastAPI) -> None:
        if self.path == "/":
            app.router.routes.insert(0, Mount("/", FastAPI()))
        else:
            app.add_api_route(self.path, self.answer, methods=["POST", "GET", "DELETE"])

    async def answer(self) -> str:
        return "mine"


@pytest.fixture(scope="module")
def core() -> list[Any]:
    """vLLM's own routes."""
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers

    app, args = FastAPI(), SimpleNamespace(enable_tokenizer_info_endpoint=False)
    args.enable_fault_tolerance, app.state.args = False, args
    level = logging.root.level
    register_api_routers(cast(Any, args), app, ("generate",))
    logging.root.setLevel(level)  # one of vLLM's routers silences everybody's warnings
    return list(app.routes)


def app_with(core: list[Any], plugins: list[Any], monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An app to which vLLM itself has attached these plugins."""
    app = FastAPI(routes=core)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: plugins)
    interface.attach_endpoint_plugins(app, ("generate",))
    return app


def test_our_routes_replace_vllms(core: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"/v1/completions", "/v1/messages"} <= {getattr(route, "path", "") for route in core}
    check_routes(app_with(core, [AwarenessEndpoints()], monkeypatch), OURS)
    check_routes(app_with(core, [Other(PATHS[0]), AwarenessEndpoints()], monkeypatch), OURS)


@pytest.mark.parametrize("path", [*PATHS, "/"])
def test_a_plugin_that_takes_a_path_of_ours_stops_the_start(
    core: list[Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app = app_with(core, [AwarenessEndpoints(), Other(path)], monkeypatch)
    with pytest.raises(UnsupportedServer, match="VLLM_PLUGINS") as error:
        check_routes(app, OURS)
    assert (path if path != "/" else PATHS[0]) in error.value.what


def test_routes_that_vllm_keeps_before_ours_stop_the_start(core: list[Any]) -> None:
    """As 0.30 and 0.31 do: they attach plugins behind the core's routes."""
    app = FastAPI(routes=core)
    AwarenessEndpoints().attach_router(app)
    with pytest.raises(UnsupportedServer, match="/v1/completions"):
        check_routes(app, OURS)


def test_a_server_asks_before_it_serves(core: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = {"kv_connector": CONNECTOR, "kv_connector_module_path": CONNECTOR_MODULE}
    config = VllmConfig(kv_transfer_config=KVTransferConfig(kv_role="kv_consumer", **transfer))
    engine: Any = SimpleNamespace(vllm_config=config)

    def started(*plugins: Any) -> None:
        app = app_with(core, [*plugins], monkeypatch)
        args: Any = SimpleNamespace()
        asyncio.run(interface.init_endpoint_plugins_state(engine, app.state, args))

    ours, other = AwarenessEndpoints(), Other("/v1/completions")
    other.init_state = ours.init_state  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedServer, match="/v1/completions"):
        started(ours, other)
    with pytest.raises(BadInput, match="store"):  # the next thing that is wrong
        started(AwarenessEndpoints())
    config.parallel_config.data_parallel_size = 2
    with pytest.raises(UnsupportedServer, match="load balancer"):
        started(AwarenessEndpoints())
