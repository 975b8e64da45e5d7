"""Memories of a registry on a server: looked up, refused before they are pulled, pulled once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_registry import Answer, Request, hostile_registry
from memories_server import CHECK, DELETE, GET, LOAD, UNKNOWN, Make, Server, allow_captures
from pulls_server import pulls_of, relist, retag, serve, watched, without_text
from registry_server import PASSWORD, USER, basic_auth, registry_server

from awareness_vllm.errors import RegistryDenied, RegistryTimeout
from awareness_vllm.marketplace.files import artefact_of, push_file
from awareness_vllm.oci import cache as cache_module
from awareness_vllm.oci.cache import Cache
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.serving import pulls as module
from awareness_vllm.serving.config import transfer_config
from awareness_vllm.serving.connector.worker_extension import PREFETCH
from awareness_vllm.serving.offline import OfflineMemories
from awareness_vllm.serving.registry import pulled_folder
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "layout"


@pytest.fixture
def push(layout: Path, tmp_path: Path) -> Callable[..., str]:
    """Push a package of somebody's into the registry; its ID."""

    def push(package: Any, **changes: Any) -> str:
        path = publish(package, tmp_path / "author", **changes)
        push_file(path, open_repository(layout))
        return path.stem

    return push


@pytest.fixture
def served(
    tmp_path: Path, layout: Path, tiny_models: tuple[Path, Path], wmatrix: WMatrix
) -> Iterator[Server]:
    """A server of two tenants with a registry, and a map for the packages in it."""
    yield from serve(tmp_path, layout, tiny_models[1], wmatrix)


def test_a_memory_that_no_store_has_is_pulled_for_its_first_use(
    served: Server, push: Callable[..., str], make_package: Make
) -> None:
    memory = push(make_package())
    detail = served.get(memory)
    assert (detail["location"], detail["created"]) == ("registry", None)
    assert detail["compatibility"]["loadable"] is True
    assert detail["compatibility"]["wmatrix"] == "pair.wmatrix"
    assert served.call(CHECK, memory).json()["tokens"] == detail["tokens"]
    assert served.get()["data"] == []
    assert watched(served).fetches == 0
    response = served.call(LOAD, memory)
    assert response.status_code == 200, response.text
    assert [name for name, _ in served.engine.calls] == [PREFETCH]
    (listed,) = served.get()["data"]
    assert (listed["id"], listed["location"]) == (memory, "cache")
    assert served.get(memory)["compatibility"]["prompt_tokens"] > 0
    # Nobody fetches from here what a registry has, though the very bytes were captured here.
    allow_captures(served)
    refused = served.call("GET /{}/package", memory)
    assert (refused.status_code, "registry" in refused.text) == (400, True)
    assert not served.path(memory).exists()  # the tenant's quota is untouched
    # Another tenant may use it too, but does not see that somebody did.
    assert served.get(tenant="umbrella")["data"] == []
    looked_up = watched(served).lookups
    assert served.call(LOAD, memory, tenant="umbrella").status_code == 200
    assert (watched(served).fetches, watched(served).lookups) == (1, looked_up)


def test_a_tenant_without_the_registry_has_nothing_of_it(
    tmp_path: Path,
    layout: Path,
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    push: Callable[..., str],
    make_package: Make,
) -> None:
    memory = push(make_package())
    without = {"registry": False}
    for served in serve(tmp_path, layout, tiny_models[1], wmatrix, umbrella=without):
        assert served.call(LOAD, memory).status_code == 200
        for route in (GET, CHECK, LOAD, DELETE):
            theirs, nobodys = (
                served.call(route, one, tenant="umbrella") for one in (memory, UNKNOWN)
            )
            assert theirs.status_code == 404
            assert theirs.text.replace(memory, UNKNOWN) == nobodys.text
        assert watched(served).lookups == 1


def test_a_tenants_own_file_counts_first(
    served: Server, push: Callable[..., str], make_package: Make
) -> None:
    memory = push(make_package())
    served.publish(make_package())
    assert served.get(memory)["location"] == "store"
    assert served.call(LOAD, memory).status_code == 200
    assert watched(served).lookups == 0


def test_a_pulled_memory_is_claimed(
    served: Server, push: Callable[..., str], make_package: Make
) -> None:
    memory = push(make_package(seed=77), sealed=False)
    asyncio.run(served.admission.admit("acme", [memory]))
    assert served.resolver.check(memory, "acme").origin == "claimed"


@pytest.mark.parametrize(
    "fault", ["no map", "too large", "size", "other memory", "no text", "no room"]
)
def test_what_cannot_be_loaded_is_refused_before_it_is_pulled(
    served: Server, push: Callable[..., str], make_package: Make, layout: Path, fault: str
) -> None:
    memory = push(make_package())
    registry = pulls_of(served).registry
    expected = fault
    if fault == "no map":
        served.resolver.registry = type(served.resolver.registry)(())
        expected = "no W-Matrix leads"
    elif fault == "too large":
        object.__setattr__(registry, "max_bytes", 100)
        expected = "--max-load-gib"
    elif fault == "size":
        relist(layout, memory, lambda listing: listing | {"bytes": listing["bytes"] + (4 << 20)})
        expected = "by its manifest"
    elif fault == "other memory":
        other = push(make_package(seed=5))
        retag(layout, other, memory)
        expected = f"the package {other}"
    elif fault == "no room":
        object.__setattr__(registry, "cache", Cache(registry.cache.folder, limit=100))
        expected = "--registry-cache-gib"
    else:
        relist(layout, memory, without_text)
        expected = "has no text"
    response = served.call(LOAD, memory)
    status = {"no text": 400, "no room": 507}.get(fault, 422)
    assert response.status_code == status, response.text
    assert expected in response.json()["error"]["message"]
    assert watched(served).fetches == 0
    assert served.engine.calls == []


def test_an_unknown_memory_is_the_404_of_ever_and_is_not_asked_for_again(
    served: Server, server: Server
) -> None:
    for route in (GET, CHECK, LOAD, DELETE):
        with_registry, without = (one.call(route, UNKNOWN) for one in (served, server))
        assert with_registry.status_code == 404
        assert with_registry.content == without.content
    assert watched(served).lookups == 1


def test_a_tenant_that_guesses_ids_is_stopped(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MISSES", 5)  # one comes back after 12 s

    def guess(number: int, tenant: str = "acme") -> int:
        return served.call(GET, f"mem_{number:032x}", tenant=tenant).status_code

    watched(served).error = RegistryTimeout("too slow")
    assert [guess(number) for number in range(7)] == [504] * 7  # not the tenant's fault
    watched(served).error, watched(served).lookups = None, 0
    assert [guess(number) for number in range(7)] == [404] * 5 + [429] * 2
    assert watched(served).lookups == 5
    assert guess(8, "umbrella") == 404


def test_a_pull_that_takes_too_long_is_a_504_and_goes_on(
    tmp_path: Path,
    layout: Path,
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    push: Callable[..., str],
    make_package: Make,
) -> None:
    memory, other = push(make_package()), make_package(seed=3)
    for served in serve(tmp_path, layout, tiny_models[1], wmatrix, load_timeout=0.3):
        local = served.publish(other)
        watched(served).may_send.clear()
        for _ in range(2):
            response = served.call(LOAD, memory)
            assert response.status_code == 504
            assert "--load-timeout" in response.json()["error"]["message"]
        assert served.call(LOAD, local).status_code == 200
        assert served.admission.loads == {}
        watched(served).may_send.set()
        assert served.call(LOAD, memory).status_code == 200
        assert watched(served).fetches == 1


def test_many_requests_pull_each_memory_once_and_some_at_once(
    served: Server, push: Callable[..., str], make_package: Make
) -> None:
    memories = [push(make_package(seed=seed)) for seed in range(module.MAX_PULLS + 2)]
    watched(served).may_send.clear()

    async def all_at_once() -> None:
        requests = [
            asyncio.create_task(served.admission.admit("acme", [memory])) for memory in memories * 3
        ]
        admitted = served.admission.loads  # one that came later would look its memory up again
        while sum(load.requests for load in admitted.values()) < len(requests):
            await asyncio.sleep(0.01)
        while watched(served).at_once < module.MAX_PULLS:
            await asyncio.sleep(0.01)
        watched(served).may_send.set()
        for request in requests:
            (await request).end()

    asyncio.run(all_at_once())
    assert watched(served).lookups == watched(served).fetches == len(memories)
    assert watched(served).most_at_once == module.MAX_PULLS
    assert served.admission.loads == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RegistryTimeout("too slow"), 504),
        (RegistryDenied("keys.example does not let us in", found="401"), 502),
    ],
)
def test_a_registry_that_fails_is_named_and_harms_nobody_else(
    served: Server, push: Callable[..., str], make_package: Make, error: Any, status: int
) -> None:
    memory, local = push(make_package()), served.publish(make_package(seed=2))
    watched(served).error = error
    for route in (GET, LOAD):
        response = served.call(route, memory)
        assert response.status_code == status, response.text
        assert error.what in response.json()["error"]["message"]
    assert served.call(LOAD, local).status_code == 200
    watched(served).error = None
    module_refusals = pulls_of(served).refusals
    module_refusals.values.clear()  # a second later
    assert served.call(LOAD, memory).status_code == 200


def test_a_real_registry_that_lets_nobody_in(
    tmp_path: Path,
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    make_package: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a login the memory is pulled; without it or once it is down the answer says so, and
    never what the login is."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = (publish(make_package(seed=seed), tmp_path / "author") for seed in (1, 2))
    with registry_server(tmp_path / "registry", basic_auth(tmp_path)) as registry:
        where = registry.reference()
        for path in (first, second):
            push_file(path, open_repository(where, api_key=f"{USER}:{PASSWORD}"))
        monkeypatch.setenv("AWARENESS_REGISTRY", where)
        monkeypatch.setenv("AWARENESS_REGISTRY_KEY", f"{USER}:{PASSWORD}")
        for served in serve(tmp_path, where, tiny_models[1], wmatrix):
            assert served.call(LOAD, first.stem).status_code == 200
            answers = [served.call(LOAD, UNKNOWN)]
            assert answers[0].status_code == 404
        assert PASSWORD not in str(transfer_config(served.config))
        monkeypatch.setenv("AWARENESS_REGISTRY_KEY", f"{USER}:wrong")
        for served in serve(tmp_path, where, tiny_models[1], wmatrix):
            assert served.call(LOAD, first.stem).status_code == 200  # from the cache
            answers.append(served.call(LOAD, second.stem))
            assert "401" in answers[-1].text
    for served in serve(tmp_path, where, tiny_models[1], wmatrix):
        answers.append(served.call(LOAD, second.stem))
        assert registry.host in answers[-1].text
    assert [answer.status_code for answer in answers[1:]] == [502, 502]
    assert not [answer for answer in answers if PASSWORD in answer.text or "wrong" in answer.text]


def hotel(request: Request) -> None:
    request.answer(b"<html>Welcome to the hotel's network</html>", Content_Type="text/html")


def other_bytes(request: Request) -> None:
    request.ranged(bytes(len(request.registry.file)))


def drip(request: Request) -> None:
    request.drip(request.registry.file, Content_Length=str(len(request.registry.file)))


@pytest.mark.parametrize(
    ("path", "odd", "status"),
    [
        ("/manifests/", hotel, 422),
        ("/manifests/", drip, 504),
        ("LAYER", other_bytes, 422),
        ("LAYER", drip, 504),
    ],
)
def test_a_hostile_registry(
    tmp_path: Path,
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    make_package: Make,
    path: str,
    odd: Answer,
    status: int,
) -> None:
    file = publish(make_package(), tmp_path / "author")
    with hostile_registry(artefact_of(file), file.stem) as hostile:
        hostile.odd[path.replace("LAYER", hostile.layer.digest)] = odd
        model, where = tiny_models[1], hostile.reference
        for served in serve(tmp_path, where, model, wmatrix, load_timeout=1.0):
            local = served.publish(make_package(seed=2))
            response = served.call(LOAD, file.stem)
            assert response.status_code == status, response.text
            assert served.call(LOAD, local).status_code == 200
            assert not [*pulled_folder(where).glob("mem_*")]
            for thread in threading.enumerate():  # a pull goes on for as long again
                if path == "/manifests/" and thread.name == "awareness-registry":
                    thread.join(1)
                    assert not thread.is_alive()


def test_a_damaged_layer_leaves_nothing_behind(
    served: Server, push: Callable[..., str], make_package: Make, layout: Path
) -> None:
    memory = push(make_package())
    (blob,) = (b for b in (layout / "blobs/sha256").iterdir() if b.name.startswith(memory[4:]))
    blob.write_bytes(bytes(blob.stat().st_size))
    for _ in range(2):
        assert served.call(LOAD, memory).status_code == 422
    assert watched(served).fetches == 1  # not again for a while
    assert not [*pulled_folder(str(layout)).glob("mem_*")]
    assert served.get()["data"] == []


def test_a_file_that_leaves_the_cache_or_rots_there_is_pulled_again(
    tmp_path: Path,
    layout: Path,
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    push: Callable[..., str],
    make_package: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_module, "FRESH", 0.0)
    memories = [push(make_package(seed=seed)) for seed in (1, 2)]
    size = (tmp_path / "author" / f"{memories[0]}.safetensors").stat().st_size
    gib = 1.5 * size / 2**30  # room for one
    for served in serve(tmp_path, layout, tiny_models[1], wmatrix, registry_cache_gib=gib):
        for memory in memories * 2:
            assert served.call(LOAD, memory).status_code == 200
        assert watched(served).fetches == 4
        (file,) = pulled_folder(str(layout)).glob("mem_*.safetensors")
        assert file.stem == memories[1]
        assert [one["id"] for one in served.get()["data"]] == [memories[1]]

        file.write_bytes(bytes(file.stat().st_size))
        assert served.call(LOAD, memories[1]).status_code == 422
        assert served.call(LOAD, memories[1]).status_code == 200
        assert watched(served).fetches == 5


def test_offline_memories_are_pulled_too(
    tmp_path: Path,
    layout: Path,
    tiny_models: tuple[Path, Path],
    push: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = push(capture(tiny_models[1], "some words"))
    monkeypatch.chdir(tmp_path)
    offline = OfflineMemories(tiny_models[1], tmp_path / "store", registry="layout")
    offline.set_window(300)
    _, extra_args = offline.prompt("and", [memory])
    assert memory in json.dumps(extra_args)
    assert offline.resolver.stores[""].is_pulled(memory)
