"""`/v1/memories` over HTTP: whose memories are seen, and IDs that are none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memories_server import (
    DELETE,
    GET,
    LIST,
    ONE_MEMORY,
    UNKNOWN,
    Make,
    Server,
    app,
)
from starlette.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from awareness_vllm.packages.file import publish
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.worker_extension import EVICT
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


# Whose, and who asks


@pytest.mark.parametrize("route", ONE_MEMORY)
def test_a_foreign_memory_looks_like_one_that_nobody_has(
    server: Server, make_package: Make, wmatrix: WMatrix, route: str
) -> None:
    server.add_map(wmatrix)
    foreign = server.publish(make_package(), "umbrella")
    assert server.call(route, foreign, tenant="umbrella").status_code == 200
    server.engine.calls.clear()
    theirs, nobodys = (server.call(route, memory) for memory in (foreign, UNKNOWN))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.content.replace(foreign.encode(), UNKNOWN.encode()) == nobodys.content
    assert theirs.headers == nobodys.headers
    assert theirs.json()["error"]["type"] == "NotFoundError"
    assert server.engine.calls == []


def test_a_page_after_a_foreign_memory_tells_nothing_of_it(
    server: Server, make_package: Make
) -> None:
    mine = sorted(server.publish(make_package(seed=seed)) for seed in range(3))
    foreign = server.publish(make_package(seed=9), "umbrella")
    for after in (foreign, UNKNOWN, "mem_" + "f" * 32):
        listed = [memory["id"] for memory in server.get(after=after)["data"]]
        assert listed == [memory for memory in mine if memory > after]


@pytest.mark.parametrize("route", [LIST, *ONE_MEMORY])
@pytest.mark.parametrize("header", [None, "Bearer sk-unknown", "Basic sk-acme", "Bearer"])
def test_without_a_key_the_answer_is_vllms_own(
    server: Server, make_package: Make, route: str, header: str | None
) -> None:
    memory = server.publish(make_package())
    headers = {"Authorization": header} if header else {}
    method, _, path = route.partition(" ")
    url = "/v1/memories" + path.format(memory)
    response = server.client.request(method, url, headers=headers)
    guarded = FastAPI()
    guarded.add_middleware(AuthenticationMiddleware, tokens=["sk-acme"])
    expected = TestClient(guarded).request(method, url, headers=headers)
    assert response.status_code == expected.status_code == 401
    assert response.content == expected.content
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert server.engine.calls == []


@pytest.mark.parametrize("tenant", ["acme", None])
def test_without_tenants_nobody_needs_a_key(
    tmp_path: Path,
    tiny_models: tuple[Path, Path],
    make_package: Make,
    tenant: str | None,
) -> None:
    memory = publish(make_package(), tmp_path).stem
    server = Server(ServingConfig(store=str(tmp_path)), tiny_models[1])
    assert server.get(tenant=tenant)["data"][0]["id"] == memory
    assert server.get(memory, tenant=tenant)["id"] == memory
    assert server.call(DELETE, memory, tenant=tenant).json()["evicted"]
    assert server.engine.calls == [(EVICT, (memory, ""))]


@pytest.mark.parametrize("route", [LIST, *ONE_MEMORY])
def test_a_server_without_the_connector_says_so(route: str) -> None:
    method, _, path = route.partition(" ")
    response = TestClient(app()).request(method, "/v1/memories" + path.format(UNKNOWN))
    assert response.status_code == 400
    assert "this server serves no memories" in response.json()["error"]["message"]


# IDs that are none


class Touched:
    """Records the paths that are looked at through pathlib while it is entered."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __enter__(self) -> Touched:
        self.patch = pytest.MonkeyPatch()
        for name in ("stat", "open", "is_file", "read_bytes"):
            self.patch.setattr(Path, name, self.recorder(getattr(Path, name)))
        return self

    def recorder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def record(path: Path, *args: Any, **kwargs: Any) -> Any:
            self.paths.append(os.fspath(path))
            return original(path, *args, **kwargs)

        return record

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()


def percent_encoded(memory: str) -> str:
    return "".join(f"%{byte:02x}" for byte in memory.encode())


HOSTILE = [
    "..",
    ".",
    "%2e%2e",
    "..\\..\\secret",
    "\0",
    "mem_",
    UNKNOWN + "\0",
    UNKNOWN + "\n",
    UNKNOWN + " ",
    UNKNOWN.upper(),
    UNKNOWN + ".safetensors",
    UNKNOWN[:-1] + "\u0660",  # a digit, to some
    "mem_" + "g" * 32,
    "ｍem_" + "0" * 32,
    "\u202e" + UNKNOWN,
    "mem_" + "0" * 20_000,
    "*",
    "mem_*",
]
PATHS = ["../umbrella/{}", "../../outside/{}", "{}/../{}", "./{}", "/{}", "../.."]


@pytest.mark.parametrize("route", ONE_MEMORY)
@pytest.mark.parametrize("memory", HOSTILE, ids=lambda memory: ascii(memory)[:40])
def test_a_malformed_id_touches_nothing(server: Server, route: str, memory: str) -> None:
    refused_untouched(server, route, memory)


def refused_untouched(server: Server, route: str, memory: str) -> None:
    with Touched() as touched:
        response = server.call(route, percent_encoded(memory))
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert response.json()["error"]["message"].startswith("malformed memory ID.")
    assert touched.paths == []
    assert server.engine.calls == []


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(memory=st.text(st.characters(exclude_characters="/", codec="utf-8"), min_size=1))
def test_any_text_is_refused_as_an_id(server: Server, memory: str) -> None:
    refused_untouched(server, GET, memory)


@pytest.mark.parametrize("route", ONE_MEMORY)
@pytest.mark.parametrize("encode", [percent_encoded, lambda path: path.replace("/", "%2f")])
@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_no_id(
    server: Server,
    make_package: Make,
    route: str,
    encode: Callable[[str], str],
    path: str,
) -> None:
    outside = publish(make_package(seed=3), server.stores.parent / "outside").stem
    foreign = server.publish(make_package(seed=4), "umbrella")
    server.stores.joinpath("acme").mkdir()
    for memory in (outside, foreign):
        with Touched() as touched:
            response = server.call(route, encode(path.replace("{}", memory)))
        assert 400 <= response.status_code < 500
        assert "tiny" not in response.text
        assert touched.paths == []
        assert server.engine.calls == []


# How it is served


def test_looking_up_does_not_hold_up_the_event_loop(
    server: Server, make_package: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, looked_up = server.publish(make_package()), []

    def beside_the_loop(original: Callable[..., Any]) -> Callable[..., Any]:
        def look_up(*args: Any) -> Any:
            looked_up.append(threading.get_ident())
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return original(*args)

        return look_up

    for name in ("ids", "path"):
        monkeypatch.setattr(Store, name, beside_the_loop(getattr(Store, name)))
    for route in (LIST, *ONE_MEMORY):
        looked_up.clear()
        server.call(route, memory)
        assert looked_up
