"""A server of `/v1/memories` for two tenants. Stores, packages, resolution and vLLM's error
handlers are the real ones; the engine is a recorder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute
from starlette.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.serving.admission import Admission
from awareness_vllm.serving.api.canary import Canary
from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.api.front_end import pulls_of
from awareness_vllm.serving.api.guard import Guard
from awareness_vllm.serving.api.memories import router
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.worker_extension import (
    CALL,
    CANCEL,
    EVICT,
    LOADED,
    PREFETCH,
    WorkerCalls,
)
from awareness_vllm.serving.http import FrontEnd, answer_busy, answer_unauthorized
from awareness_vllm.serving.params import is_signed
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.storage import CaptureLimits
from awareness_vllm.serving.tenants import Tenants
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

KEYS = {"acme": "sk-acme", "umbrella": "sk-umbrella"}
UNKNOWN = "mem_" + "0" * 32
LIST, GET, LOAD, DELETE = "GET ", "GET /{}", "POST /{}/load", "DELETE /{}"
CHECK = "GET /{}/compatibility"
ONE_MEMORY = (GET, CHECK, LOAD, DELETE)
LIMIT = 300
"""Tokens of the server's context window."""


@dataclass
class Engine:
    """Stands for vLLM's EngineClient: records calls, and answers as two workers would.

    The calls are those that the real worker extension takes.
    """

    answers: dict[str, list[Any]] = field(
        default_factory=lambda: {
            **{PREFETCH: ["cold", "cold"], EVICT: [True, True]},
            **{LOADED: [[], []], CANCEL: [None, None]},
        }
    )
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        name, arguments, signed_by = args
        assert method == CALL
        assert is_signed(signed_by, name, *arguments)
        inspect.signature(getattr(WorkerCalls, name)).bind(None, *arguments)
        self.calls.append((name, tuple(arguments)))
        return self.answers[name]


class Server:
    """Our routes with vLLM's error handlers, called by one tenant or another."""

    def __init__(self, config: ServingConfig, model: Path) -> None:
        self.engine, self.stores = Engine(), Path(config.store).parent
        self.tenants, self.config = Tenants.read(config.tenants), config
        self.app = app()
        self.serve(MemoryResolver.from_config(config, ServedModel.read(model, LIMIT)))
        self.client = TestClient(self.app)

    def serve(self, resolver: MemoryResolver, context_length: int | None = None) -> None:
        self.resolver = resolver
        client = MemoryEngineClient(cast("EngineClient", self.engine))
        pulls = pulls_of(self.config, resolver)
        self.admission = Admission(
            resolver.stores, client.loaded, 32, self.config.max_load_bytes, pulls
        )
        self.app.state.awareness = FrontEnd(
            resolver,
            self.tenants,
            client,
            TargetConfig(context_length=context_length or resolver.model.max_model_len),
            Canary(client),
            self.admission,
            CaptureLimits(),
            Editions(client),
        )

    def set_window(self, tokens: int) -> None:
        model = replace(self.resolver.model, max_model_len=tokens)
        self.serve(self.resolver.with_model(model))

    def call(
        self, route: str, memory: str = "", *, tenant: str | None = "acme", **query: Any
    ) -> Any:
        """`route` is a method and a path after `/v1/memories`, with {} for the ID."""
        method, _, path = route.partition(" ")
        headers = {"Authorization": f"Bearer {KEYS[tenant]}"} if tenant else {}
        url = "/v1/memories" + path.format(memory)
        return self.client.request(method, url, headers=headers, params=query)

    def get(self, memory: str = "", **query: Any) -> Any:
        response = self.call(GET if memory else LIST, memory, **query)
        assert response.status_code == 200, response.text
        return response.json()

    def publish(self, package: Package, tenant: str = "acme") -> str:
        """Put a package into a tenant's store; its ID."""
        return publish(package, self.stores / tenant).stem

    def path(self, memory: str) -> Path:
        return self.stores / "acme" / f"{memory}.safetensors"

    def tokens(self, memory: str) -> int:
        """Ids of a memory of acme's in a prompt of its own."""
        return len(self.resolver.resolve_one(memory, "acme").ids)

    def add_map(self, wmatrix: WMatrix, retention: float | None = None) -> None:
        """Give the server a map to its model, with a certificate or without."""
        certificate = None if retention is None else certificate_with(retention)
        target = self.resolver.model.geometry
        update = {"target": target, "certificate": certificate, "sink": (2,)}
        manifest = wmatrix.manifest.model_copy(update=update)
        entry = WMatrixEntry(Path("/maps/pair.wmatrix"), manifest, "d" * 64)
        self.resolver.registry = Registry((entry,))


@cache
def routes() -> list[BaseRoute]:
    """Our routes as an app includes them, which takes ten milliseconds: they keep no state."""
    including = APIRouter()
    including.include_router(router)
    return including.routes


def app() -> FastAPI:
    made = FastAPI()
    made.router.routes.extend(routes())
    made.add_middleware(Guard, memory_routes=())
    answer_unauthorized(made)
    answer_busy(made)
    init_exception_handler(made)
    made.state.args = SimpleNamespace(log_error_stack=False)
    made.state.awareness = None
    return made


def server_of_tenants(
    folder: Path, model: Path, *, umbrella: Mapping[str, Any] | None = None, **options: Any
) -> Server:
    """A server with a store in `folder`/stores for each tenant, and further `options`; and further
    fields of the tenant `umbrella`."""
    content: dict[str, dict[str, Any]] = {
        name: {"api_keys": [key], "store": f"stores/{name}"} for name, key in KEYS.items()
    }
    content["umbrella"] |= umbrella or {}
    (folder / "tenants.json").write_text(json.dumps(content))
    tenants, store = str(folder / "tenants.json"), str(folder / "stores" / "default")
    return Server(ServingConfig(store=store, tenants=tenants, **options), model)


def certificate_with(retention: float) -> dict[str, Any]:
    """A certificate with one plan of this retention."""
    interval = {"mean": retention, "ci_low": 0.0, "ci_high": 1.0}
    plan = {"context": 300, "tail": 0, "cost": 0.1, "top1": 0.8, "kinds": {}}
    protocol = {"texts": "t", "cases": "c", "limit": 8, "context": 300, "continuation": 60}
    fields: dict[str, Any] = {
        **{"protocol": protocol, "texts": {}, "cases": {}, "counts": {"texts": 8}},
        **{"versions": {}, "metrics": None, "tier": None, "hardware": "h"},
        **{"measured": "2026-01-01", "facts_kinds": {}, "facts_distances": {}},
        **dict.fromkeys(("retention", "margin", "facts", "facts_margin"), interval),
        "plans": [{**plan, "retention": interval, "tokens_only": interval}],
    }
    return Certificate.model_validate(fields).model_dump(mode="json")


Make = Callable[..., Package]
"""The fixture `make_package`."""


def allow_captures(server: Server) -> None:
    front = server.app.state.awareness
    object.__setattr__(front, "capture_limits", CaptureLimits(allowed=True, min_free=0))
