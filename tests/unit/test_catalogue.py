"""`/v1/memories` over HTTP: whose memories are seen, what is said of them, and what is not.

Stores, packages, resolution and vLLM's error handlers are the real ones; the engine is a recorder.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, publish, without_text
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.api.memories import router
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.worker_extension import (
    EVICT,
    PREFETCH,
    AwarenessWorkerExtension,
)
from awareness_vllm.serving.http import answer_unauthorized
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.resolver import Memories
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

pytestmark = pytest.mark.unit

KEYS = {"acme": "sk-acme", "umbrella": "sk-umbrella"}
UNKNOWN = "mem_" + "0" * 32
LIMIT = 300
"""Tokens of the server's context window."""
Publish = Callable[..., str]


@dataclass
class Engine:
    """Stands for vLLM's EngineClient: records calls, and answers as two workers would.

    The calls are those that the real worker extension takes.
    """

    answers: dict[str, list[Any]] = field(
        default_factory=lambda: {PREFETCH: ["cold", "cold"], EVICT: [True, True]}
    )
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        inspect.signature(getattr(AwarenessWorkerExtension, method)).bind(None, *args)
        self.calls.append((method, args))
        return self.answers[method]


class Server:
    """Our routes with vLLM's error handlers, asked by one tenant or another."""

    def __init__(self, memories: Memories | None) -> None:
        self.memories, self.engine = memories, Engine()
        self.app = FastAPI()
        self.app.include_router(router)
        answer_unauthorized(self.app)
        init_exception_handler(self.app)
        self.app.state.args = SimpleNamespace(log_error_stack=False)
        self.app.state.awareness = memories
        self.app.state.awareness_target = TargetConfig(context_length=LIMIT)
        self.app.state.awareness_engine_client = MemoryEngineClient(
            cast("EngineClient", self.engine)
        )
        self.client = TestClient(self.app)

    def ask(
        self, route: str, memory: str = "", *, tenant: str | None = "acme", **query: Any
    ) -> Any:
        """`route` is a method and a path after `/v1/memories`, with {} for the ID."""
        method, _, path = route.partition(" ")
        headers = {"Authorization": f"Bearer {KEYS[tenant]}"} if tenant else {}
        url = "/v1/memories" + path.format(memory)
        return self.client.request(method, url, headers=headers, params=query)

    def get(self, memory: str = "", **query: Any) -> Any:
        response = self.ask("GET /{}" if memory else "GET ", memory, **query)
        assert response.status_code == 200, response.text
        return response.json()


LIST, GET, LOAD, DELETE = "GET ", "GET /{}", "POST /{}/load", "DELETE /{}"
CHECK = "GET /{}/compatibility"
ONE_MEMORY = (GET, CHECK, LOAD, DELETE)


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """The folder with a folder of packages for each tenant."""
    content = {name: {"api_keys": [key], "store": f"stores/{name}"} for name, key in KEYS.items()}
    (tmp_path / "tenants.json").write_text(json.dumps(content))
    return tmp_path / "stores"


@pytest.fixture
def server(stores: Path, tiny_models: tuple[Path, Path]) -> Server:
    tenants = str(stores.parent / "tenants.json")
    config = ServingConfig(store=str(stores / "default"), tenants=tenants)
    return Server(Memories(config, str(tiny_models[1]), LIMIT))


@pytest.fixture
def published(stores: Path, make_package: Callable[..., Package]) -> Publish:
    """Publish a package of the tiny geometry for a tenant; its ID."""

    def publish_for(tenant: str = "acme", text: str = "hello wörld", seed: int = 0) -> str:
        return publish(make_package(text, seed), stores / tenant).stem

    return publish_for


@pytest.fixture
def map_in(wmatrix: WMatrix) -> Callable[..., None]:
    """Give a server a map from the tiny geometry to its model, certified or not."""

    def give(server: Server, kept: float | None) -> None:
        assert server.memories is not None
        target = server.memories.geometry
        certificate = None if kept is None else certificate_with(kept)
        update = {"target": target, "certificate": certificate, "sink": (2,)}
        manifest = wmatrix.manifest.model_copy(update=update)
        entry = WMatrixEntry(Path("/maps/pair.wmatrix"), manifest, "d" * 64)
        server.memories.registry = Registry((entry,))

    return give


def certificate_with(kept: float) -> dict[str, Any]:
    """A certificate whose one plan keeps so much."""
    interval = {"mean": kept, "ci_low": 0.0, "ci_high": 1.0}
    plan = {"context": 300, "tail": 0, "cost": 0.1, "top1": 0.8, "kinds": {}}
    certificate = Certificate.model_validate(
        {
            "protocol": {
                **{"texts": "t", "cases": "c"},
                **{"limit": 8, "context": 300, "continuation": 60},
            },
            **{"texts": {}, "cases": {}, "counts": {"texts": 8}, "versions": {}},
            **{"metrics": None, "tier": None, "hardware": "h", "measured": "2026-01-01"},
            **{"facts_kinds": {}, "facts_distances": {}},
            **{name: interval for name in ("retention", "margin", "facts", "facts_margin")},
            "plans": [{**plan, "retention": interval, "tokens_only": interval}],
        }
    )
    return certificate.model_dump(mode="json")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# The list


def test_the_list_is_the_tenants_own(server: Server, published: Publish, stores: Path) -> None:
    mine = sorted(published(seed=seed) for seed in range(3))
    other = published("umbrella", seed=9)
    found = server.get()
    assert [memory["id"] for memory in found["data"]] == mine
    assert server.get(tenant="umbrella")["data"][0]["id"] == other
    path = stores / "acme" / f"{mine[0]}.safetensors"
    assert found["data"][0] == {
        "id": mine[0],
        "object": "memory",
        "created": int(path.stat().st_mtime),
        "bytes": path.stat().st_size,
        "name": None,
        "source_model": "tiny",
        "tokens": len("hello wörld".encode()),
        "error": None,
    }
    del found["data"]
    assert found == {"object": "list", "first_id": mine[0], "last_id": mine[2], "has_more": False}


def test_an_empty_list(server: Server) -> None:
    assert server.get() == {
        **{"object": "list", "data": [], "first_id": None, "last_id": None},
        "has_more": False,
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 1000])
def test_pages_make_the_whole_list(server: Server, published: Publish, limit: int) -> None:
    ids = sorted(published(seed=seed) for seed in range(4))
    seen: list[str] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        page = server.get(**query)
        seen += [memory["id"] for memory in page["data"]]
        assert page["has_more"] == (len(seen) < len(ids))
        if not page["has_more"]:
            break
        assert len(page["data"]) == limit
        query["after"] = page["last_id"]
    assert seen == ids


def test_a_page_holds_a_hundred_memories(
    server: Server, monkeypatch: pytest.MonkeyPatch, published: Publish
) -> None:
    memory = published()
    monkeypatch.setattr(Store, "ids", lambda self: iter([memory] * 101))
    found = server.get()
    assert (len(found["data"]), found["has_more"]) == (100, True)


def test_a_page_goes_on_after_a_memory_that_is_gone(
    server: Server, published: Publish, stores: Path
) -> None:
    first, second, third = sorted(published(seed=seed) for seed in range(3))
    (stores / "acme" / f"{second}.safetensors").unlink()
    assert [memory["id"] for memory in server.get(after=second)["data"]] == [third]
    assert [memory["id"] for memory in server.get(after=first)["data"]] == [third]


def test_a_package_that_cannot_be_read_is_listed_as_such(
    server: Server, published: Publish, stores: Path
) -> None:
    good, bad = published(), "mem_" + "f" * 32
    (stores / "acme" / f"{bad}.safetensors").write_bytes(b"no package")
    (stores / "acme" / "README").write_text("no package either")
    ours, found = server.get()["data"]
    assert (ours["id"], ours["error"]) == (good, None)
    assert found["error"] == f"memory package {bad}.safetensors cannot be used"
    assert (found["id"], found["bytes"], found["tokens"]) == (bad, 10, None)


@pytest.mark.parametrize("moment", ["before its path is asked", "before it is read"])
def test_a_memory_that_goes_away_while_it_is_listed_is_left_out(
    server: Server, published: Publish, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    memory = published()
    monkeypatch.setattr(Store, "ids", lambda self: iter([UNKNOWN, memory]))
    if moment == "before it is read":
        monkeypatch.setattr(Store, "path", lambda self, one: self.folder / f"{one}.safetensors")
    assert [one["id"] for one in server.get()["data"]] == [memory]


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"after": ""}, {"after": "../x"}]
)
def test_a_page_that_cannot_be_is_refused(server: Server, query: dict[str, Any]) -> None:
    response = server.ask(LIST, **query)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["param"].endswith(next(iter(query)))


# One memory


def test_a_copy_is_exact_and_not_certified(
    server: Server, stores: Path, tiny_models: tuple[Path, Path]
) -> None:
    path = publish(capture(tiny_models[1], "some words", name="notes"), stores / "acme")
    found = server.get(path.stem)
    manifest = read_manifest(path)
    assert found["manifest"] == manifest.model_dump(mode="json")
    assert (found["id"], found["object"], found["name"]) == (path.stem, "memory", "notes")
    assert found["compatibility"] == {
        **{"loadable": True, "wmatrix": None, "prompt_tokens": manifest.tokens},
        **{"retention": 1.0, "certified": False, "reason": None},
    }


@pytest.mark.parametrize("kept", [0.875, None])
def test_a_map_is_named_with_what_its_certificate_says(
    server: Server, published: Publish, map_in: Callable[..., None], kept: float | None
) -> None:
    memory = published()
    map_in(server, kept)
    assert server.memories is not None
    found = server.get(memory)["compatibility"]
    tokens = len(server.memories.resolve_one(memory, "acme").ids)
    assert found == {
        **{"loadable": True, "wmatrix": "pair.wmatrix", "prompt_tokens": tokens},
        **{"retention": kept, "certified": kept is not None, "reason": None},
    }
    assert tokens > 1


def test_published_figures_certify_no_map(
    server: Server, published: Publish, map_in: Callable[..., None]
) -> None:
    memory = published()
    map_in(server, 0.875)
    assert server.memories is not None
    (entry,) = server.memories.registry
    assert entry.certificate is not None
    prior = {"retention": {"mean": 0.91, "ci_low": 0.84, "ci_high": 0.98}, "basis": "prior"}
    manifest = entry.manifest.model_copy(update={"certificate": prior})
    server.memories.registry = Registry((WMatrixEntry(entry.path, manifest, "e" * 64),))
    found = server.get(memory)["compatibility"]
    assert (found["certified"], found["retention"]) == (False, None)


def test_a_check_says_what_the_certificate_predicts(
    server: Server, published: Publish, map_in: Callable[..., None]
) -> None:
    memory = published()
    map_in(server, 0.875)
    assert server.memories is not None
    found = server.ask(CHECK, memory).json()
    (entry,) = server.memories.registry
    tokens = len(server.memories.resolve_one(memory, "acme").ids)
    expected = predict(entry.certificate, tokens, 16)
    assert (found["estimated_retention"], found["tokens"]) == (expected.mean, tokens)
    assert found["basis"]["digest"] == entry.digest
    assert (found["memory"], found["target"]) == (memory, server.memories.geometry.name)


def test_a_server_that_runs_is_not_told_that_it_could_not(
    server: Server, published: Publish
) -> None:
    # Stretched positions may make a window longer than the config's own.
    server.app.state.awareness_target = TargetConfig(context_length=10**9)
    assert server.ask(CHECK, published()).status_code == 200


def test_a_check_of_what_cannot_be_loaded_is_an_answer(server: Server, published: Publish) -> None:
    found = server.ask(CHECK, published()).json()
    assert (found["compatibility_score"], found["estimated_retention"]) == (0.0, None)
    assert "no W-Matrix leads" in found["risk_factors"][0]["description"]


NOTHING = {"loadable": False, "wmatrix": None, "prompt_tokens": None, "retention": None}


def unusable(server: Server, memory: str, status: int) -> str:
    """Why a memory cannot be loaded, which all three routes must say alike."""
    found = server.get(memory)["compatibility"]
    reason = found.pop("reason")
    assert found == {**NOTHING, "certified": False}
    response = server.ask(LOAD, memory)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(reason)
    report = server.ask(CHECK, memory).json()
    assert report["refusal"] == reason
    assert (report["compatibility_score"], report["level"]) == (0.0, "Poor")
    assert (report["estimated_retention"], report["facts"]) == (None, None)
    assert server.engine.calls == []
    return str(reason)


def test_a_memory_without_a_map_cannot_be_loaded(server: Server, published: Publish) -> None:
    reason = unusable(server, published(), 422)
    assert "no W-Matrix leads from tiny to target" in reason
    assert "Remedy: fit one" in reason


def test_a_memory_without_text_cannot_be_loaded(
    server: Server, stores: Path, make_package: Callable[..., Package]
) -> None:
    memory = publish(without_text(make_package()), stores / "acme").stem
    assert "has no text" in unusable(server, memory, 400)


def test_a_memory_that_leaves_no_room_cannot_be_loaded(
    server: Server, published: Publish, map_in: Callable[..., None]
) -> None:
    memory = published()
    map_in(server, None)
    assert server.memories is not None
    tokens = len(server.memories.resolve_one(memory, "acme").ids)
    server.memories.max_model_len = tokens + 2
    assert server.get(memory)["compatibility"]["loadable"]
    server.memories.max_model_len = tokens + 1
    assert f"fewer than {tokens + 1} (max_model_len)" in unusable(server, memory, 400)


def test_a_damaged_package_is_refused_and_can_be_evicted(
    server: Server, published: Publish, stores: Path
) -> None:
    memory = published()
    damage(stores / "acme" / f"{memory}.safetensors")
    for route in (GET, LOAD):
        response = server.ask(route, memory)
        assert response.status_code == 422
        assert response.json()["error"]["type"] == "UnprocessableEntityError"
        assert response.json()["error"]["param"] == "memory_id"
        assert memory in response.json()["error"]["message"]
    assert server.engine.calls == []
    assert server.ask(DELETE, memory).status_code == 200


def test_a_package_whose_content_is_wrong_under_its_right_name_is_refused(
    server: Server, stores: Path
) -> None:
    # Its bytes are those that the ID names: they were never a package.
    stores.joinpath("acme").mkdir(parents=True)
    memory = f"mem_{hashlib.sha256(b'no package').hexdigest()[:32]}"
    (stores / "acme" / f"{memory}.safetensors").write_bytes(b"no package")
    assert server.ask(GET, memory).status_code == 422
    assert server.ask(LOAD, memory).status_code == 422


def test_what_only_resolving_finds_wrong_with_a_package_is_an_error_too(
    server: Server, published: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = published()

    def broken(self: Memories, *args: Any) -> Any:
        raise PackageCorrupt("its text is not UTF-8")

    monkeypatch.setattr(Memories, "resolve", broken)
    assert server.ask(GET, memory).status_code == 422


# The warm tier


@pytest.mark.parametrize(
    ("found", "temperature"),
    [(["cold", "cold"], "cold"), (["warm", "cold"], "cold"), (["warm", "warm"], "warm")],
)
def test_a_memory_is_warm_only_where_all_workers_had_it(
    server: Server,
    published: Publish,
    map_in: Callable[..., None],
    found: list[str],
    temperature: str,
) -> None:
    memory = published()
    map_in(server, None)
    server.engine.answers[PREFETCH] = found
    response = server.ask(LOAD, memory)
    assert response.status_code == 200
    assert response.json() == {"id": memory, "object": "memory.load", "temperature": temperature}
    ((method, (_, params_json, pin)),) = server.engine.calls
    params = LoadParams.model_validate_json(params_json)
    assert (method, pin) == (PREFETCH, False)
    assert [(part.memory, part.wmatrix) for part in params.parts] == [(memory, "d" * 64)]
    assert params.tenant == "acme"


def test_a_worker_that_cannot_load_says_why(
    server: Server, published: Publish, map_in: Callable[..., None]
) -> None:
    memory = published()
    map_in(server, None)
    server.engine.answers[PREFETCH] = ["warm", "its file is gone"]
    response = server.ask(LOAD, memory)
    assert response.status_code == 422
    assert "its file is gone" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("found", "evicted"), [([False, False], False), ([True, True], True), ([False, True], True)]
)
def test_eviction_leaves_the_package(
    server: Server, published: Publish, found: list[bool], evicted: bool
) -> None:
    memory = published()
    server.engine.answers[EVICT] = found
    response = server.ask(DELETE, memory)
    assert response.status_code == 200
    assert response.json() == {"id": memory, "object": "memory.evicted", "evicted": evicted}
    assert server.engine.calls == [(EVICT, (memory,))]
    assert server.get()["data"][0]["id"] == memory


# Whose, and who asks


@pytest.mark.parametrize("route", ONE_MEMORY)
def test_a_foreign_memory_looks_like_one_that_nobody_has(
    server: Server, published: Publish, map_in: Callable[..., None], route: str
) -> None:
    map_in(server, None)
    foreign = published("umbrella")
    assert server.ask(route, foreign, tenant="umbrella").status_code == 200
    server.engine.calls.clear()
    theirs, nobodys = (server.ask(route, memory) for memory in (foreign, UNKNOWN))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.content.replace(foreign.encode(), UNKNOWN.encode()) == nobodys.content
    assert theirs.headers == nobodys.headers
    assert theirs.json()["error"]["type"] == "NotFoundError"
    assert server.engine.calls == []


def test_a_page_after_a_foreign_memory_tells_nothing_of_it(
    server: Server, published: Publish
) -> None:
    mine = sorted(published(seed=seed) for seed in range(3))
    foreign = published("umbrella", seed=9)
    for after in (foreign, UNKNOWN, "mem_" + "f" * 32):
        found = [memory["id"] for memory in server.get(after=after)["data"]]
        assert found == [memory for memory in mine if memory > after]


@pytest.mark.parametrize("route", [LIST, *ONE_MEMORY])
@pytest.mark.parametrize("header", [None, "Bearer sk-unknown", "Basic sk-acme", "Bearer"])
def test_without_a_key_the_answer_is_vllms_own(
    server: Server, published: Publish, route: str, header: str | None
) -> None:
    memory = published()
    headers = {"Authorization": header} if header else {}
    method, _, path = route.partition(" ")
    url = "/v1/memories" + path.format(memory)
    found = server.client.request(method, url, headers=headers)
    guarded = FastAPI()
    guarded.add_middleware(AuthenticationMiddleware, tokens=["sk-acme"])
    expected = TestClient(guarded).request(method, url, headers=headers)
    assert found.status_code == expected.status_code == 401
    assert found.content == expected.content
    assert found.headers["WWW-Authenticate"] == "Bearer"
    assert server.engine.calls == []


@pytest.mark.parametrize("tenant", ["acme", None])
def test_without_tenants_nobody_needs_a_key(
    tmp_path: Path,
    tiny_models: tuple[Path, Path],
    make_package: Callable[..., Package],
    tenant: str | None,
) -> None:
    memory = publish(make_package(), tmp_path).stem
    server = Server(Memories(ServingConfig(store=str(tmp_path)), str(tiny_models[1]), LIMIT))
    assert server.get(tenant=tenant)["data"][0]["id"] == memory
    assert server.get(memory, tenant=tenant)["id"] == memory
    assert server.ask(DELETE, memory, tenant=tenant).json()["evicted"]
    assert server.engine.calls == [(EVICT, (memory,))]


@pytest.mark.parametrize("route", [LIST, *ONE_MEMORY])
def test_a_server_without_the_connector_says_so(route: str) -> None:
    response = Server(None).ask(route, UNKNOWN)
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
        response = server.ask(route, percent_encoded(memory))
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
    published: Publish,
    stores: Path,
    make_package: Callable[..., Package],
    route: str,
    encode: Callable[[str], str],
    path: str,
) -> None:
    outside = publish(make_package(seed=3), stores.parent / "outside").stem
    foreign = published("umbrella", seed=4)
    stores.joinpath("acme").mkdir()
    for memory in (outside, foreign):
        with Touched() as touched:
            response = server.ask(route, encode(path.replace("{}", memory)))
        assert 400 <= response.status_code < 500
        assert "tiny" not in response.text
        assert touched.paths == []
        assert server.engine.calls == []


# How it is served


def test_looking_up_does_not_hold_up_the_event_loop(
    server: Server, published: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, looked_up = published(), []

    def beside_the_loop(original: Callable[..., Any]) -> Callable[..., Any]:
        def look_up(*args: Any) -> Any:
            looked_up.append(threading.get_ident())
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return original(*args)

        return look_up

    for name in ("ids", "path", "checked_path"):
        monkeypatch.setattr(Store, name, beside_the_loop(getattr(Store, name)))
    for route in (LIST, *ONE_MEMORY):
        looked_up.clear()
        server.ask(route, memory)
        assert looked_up


def test_the_routes_are_documented(server: Server) -> None:
    document = server.app.openapi()
    found = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    expected = {
        ("GET", "/v1/memories"): "MemoryList",
        ("GET", "/v1/memories/{memory_id}"): "MemoryDetail",
        ("GET", "/v1/memories/{memory_id}/compatibility"): "CompatibilityReport",
        ("POST", "/v1/memories/{memory_id}/load"): "MemoryLoad",
        ("DELETE", "/v1/memories/{memory_id}"): "MemoryEvicted",
    }
    assert found.keys() == expected.keys()
    for (method, path), name in expected.items():
        operation = found[method, path]
        assert operation["description"]
        schema = {
            status: answer["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
            for status, answer in operation["responses"].items()
        }
        one = {"404": "ErrorResponse", "422": "ErrorResponse"} if "{" in path else {}
        errors = {"400": "ErrorResponse", "401": "UnauthorizedResponse", "default": "ErrorResponse"}
        assert schema == {"200": name, **errors, **one}
