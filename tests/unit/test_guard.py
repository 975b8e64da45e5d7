"""The guard before all routes: tenants' keys, and memories where they would be ignored."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.routing import APIRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.guard import OPEN_PATHS
from awareness_vllm.serving.api.routes import AwarenessEndpoints, router
from awareness_vllm.serving.tenants import Tenants

pytestmark = [pytest.mark.unit, pytest.mark.slow]

ID = "mem_" + "0" * 32
OURS = {route.path for route in router.routes if isinstance(route, APIRoute)}
TASKS = ("generate", "render", "transcription", "embed", "classify")


def vllms_app() -> FastAPI:
    """vLLM's own routes with our plugin's and vLLM's middleware, and one of another plugin."""
    app = FastAPI()
    app.state.args = SimpleNamespace(
        enable_tokenizer_info_endpoint=True,
        enable_fault_tolerance=True,
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=None,
        enable_request_id_headers=False,
        middleware=[],
    )
    model: Any = SimpleNamespace(get_pooling_task=lambda tasks: "embed", pooler_config=None)
    # Late: it imports all of vLLM's server.
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers

    level = logging.root.level
    register_api_routers(app.state.args, app, TASKS, model)
    logging.root.setLevel(level)  # one of vLLM's routers silences everybody's warnings
    AwarenessEndpoints().attach_router(app)

    @app.post("/v1/other")
    async def other(request: Request) -> Any:
        return {"bytes": len(await request.body())}

    @app.websocket("/v1/realtime-like")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    init_entrypoints_middleware(app.state.args, app, TASKS)
    app.state.awareness = None
    return app


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return vllms_app()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    app.state.awareness = None
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def guarded(app: FastAPI, client: TestClient, tmp_path: Path) -> TestClient:
    """The same with two tenants."""
    file = tmp_path / "tenants.json"
    file.write_text('{"a": {"api_keys": ["sk-a"], "store": "a"},'
                    ' "b": {"api_keys": ["sk-b"], "store": "b"}}')  # fmt: skip
    editions = Editions(cast(Any, None))
    app.state.awareness = SimpleNamespace(tenants=Tenants.read(file), editions=editions)
    return client


def routes(app: FastAPI, method: str) -> list[str]:
    found = [r.path for r in app.routes if isinstance(r, APIRoute) and method in r.methods]
    return [path.replace("{response_id}", "resp_1").replace("{memory_id}", ID) for path in found]


def test_every_other_route_of_the_server_refuses_memories(app: FastAPI, client: TestClient) -> None:
    others = [path for path in routes(app, "POST") if path not in OURS]
    needed = {"/generative_scoring", "/invocations", "/tokenize", "/v1/chat/completions/batch",
              "/inference/v1/generate", "/v1/completions/render", "/v1/messages/render",
              "/v1/audio/transcriptions", "/v1/embeddings", "/v1/other"}  # fmt: skip
    assert needed <= set(others)
    for path in others:
        for field in ("memory_ids", "memory", "memories"):
            answer = client.post(path, json={"prompt": "hi", field: [ID]})
            assert answer.status_code == 400, path
            assert "/v1/completions" in answer.text
            form = "type" if path.startswith("/v1/messages") else "error"
            assert form in answer.json()


def test_forms_are_read_too(client: TestClient) -> None:
    path = "/v1/audio/transcriptions"
    sound = {"file": ("a.wav", b"RIFF")}
    assert client.post(path, data={"memory_ids": ID}, files=sound).status_code == 400
    assert client.post("/v1/other", data={"memory": ID}).status_code == 400
    assert client.post("/v1/other", data={"other": ID}).status_code == 200
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/other", content=b"--x\r\nbroken", headers=broken).status_code == 200


@pytest.mark.parametrize(
    "content", [b'{"prompt": "' + b"x" * 200_000 + b'"}', b"", b"{", b"[" * 100_000, b"\xff"]
)
def test_everything_else_passes_as_it_came(client: TestClient, content: bytes) -> None:
    assert client.post("/v1/other", content=content).json() == {"bytes": len(content)}


def test_every_route_but_the_open_ones_wants_a_key(app: FastAPI, guarded: TestClient) -> None:
    paths = {(method, path) for method in ("GET", "POST") for path in routes(app, method)}
    assert ("GET", "/v1/models") in paths
    for method, path in [*sorted(paths), ("GET", "/openapi.json"), ("GET", "/nowhere")]:
        if path in OPEN_PATHS:
            continue
        answer = guarded.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 401, path
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/openapi.json", "/metrics", "/version", "/metrics/"):
        assert guarded.get(path).status_code == 200, path


KEYS: list[tuple[dict[str, str], int]] = [
    ({"Authorization": "Bearer sk-a"}, 200),
    ({"x-api-key": "sk-a"}, 200),
    ({"x-api-key": "sk-b"}, 200),
    ({"x-api-key": "sk-a", "Authorization": "Bearer sk-a"}, 200),
    ({"x-api-key": "sk-a", "Authorization": "Bearer a-proxys-own"}, 200),
    ({"x-api-key": "sk-a", "Authorization": "Bearer sk-b"}, 401),
    ({"x-api-key": "sk-x"}, 401),
    ({"x-api-key": ""}, 401),
    ({}, 401),
]


@pytest.mark.parametrize(("headers", "status"), KEYS)
def test_a_key_comes_in_either_header(
    guarded: TestClient, headers: dict[str, str], status: int
) -> None:
    assert guarded.post("/v1/other", headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_refusal_has_the_form_of_its_api(guarded: TestClient, path: str) -> None:
    answer = guarded.post(path, json={}, headers={"x-api-key": "sk-x"})
    error = {"type": "authentication_error", "message": "Unauthorized"}
    assert answer.json() == {"type": "error", "error": error}


def test_a_browser_may_ask_first_and_read_the_refusal(guarded: TestClient) -> None:
    page = {"Origin": "https://page", "Access-Control-Request-Method": "POST"}
    assert guarded.options("/v1/completions", headers=page).status_code == 200
    refused = guarded.post("/v1/completions", json={}, headers={"Origin": "https://page"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"


def test_a_websocket_wants_a_key_too(guarded: TestClient) -> None:
    with guarded.websocket_connect("/v1/realtime-like", headers={"x-api-key": "sk-a"}):
        pass
    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        guarded.websocket_connect("/v1/realtime-like"),
    ):
        pass
    assert refused.value.status_code == 401


def test_a_path_behind_a_proxy_is_the_same_path(app: FastAPI, guarded: TestClient) -> None:
    behind = TestClient(app, root_path="/proxy")
    assert behind.get("/proxy/version").status_code == 200
    assert behind.get("/proxy/v1/models").status_code == 401
