"""`/v1/memories` over HTTP: the list, and everything about one memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from memories_server import (
    CHECK,
    DELETE,
    GET,
    LIST,
    LOAD,
    UNKNOWN,
    Make,
    Server,
)

from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import without_text
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit


# The list


def test_the_list_is_the_tenants_own(server: Server, make_package: Make) -> None:
    mine = sorted(server.publish(make_package(seed=seed)) for seed in range(3))
    other = server.publish(make_package(seed=9), "umbrella")
    page = server.get()
    assert [memory["id"] for memory in page["data"]] == mine
    assert server.get(tenant="umbrella")["data"][0]["id"] == other
    path = server.path(mine[0])
    assert page["data"][0] == {
        "id": mine[0],
        "object": "memory",
        "created": int(path.stat().st_mtime),
        "bytes": path.stat().st_size,
        "name": None,
        "source_model": "tiny",
        "tokens": len("hello wörld".encode()),
        "signed_by": None,
        "edition_of": None,
        "latent_of": None,
        "edition": False,
        "location": "store",
        "error": None,
    }
    del page["data"]
    assert page == {"object": "list", "first_id": mine[0], "last_id": mine[2], "has_more": False}


def test_an_empty_list(server: Server) -> None:
    assert server.get() == {
        **{"object": "list", "data": [], "first_id": None, "last_id": None},
        "has_more": False,
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 1000])
def test_pages_make_the_whole_list(server: Server, make_package: Make, limit: int) -> None:
    ids = sorted(server.publish(make_package(seed=seed)) for seed in range(4))
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


def test_pages_go_on_past_entries_without_a_file(server: Server, make_package: Make) -> None:
    memory = server.publish(make_package())
    folder = server.path(memory).parent
    for digit in "0f":
        (folder / f"mem_{digit * 32}.safetensors").symlink_to(folder / "nowhere")
    page = server.get(limit=1)
    assert [one["id"] for one in page["data"]] == [page["last_id"]] == [memory]
    assert page["has_more"] is False


def test_a_page_holds_a_hundred_memories(
    server: Server, monkeypatch: pytest.MonkeyPatch, make_package: Make
) -> None:
    memory = server.publish(make_package())
    monkeypatch.setattr(Store, "ids", lambda self: iter([memory] * 101))
    page = server.get()
    assert (len(page["data"]), page["has_more"]) == (100, True)


def test_a_page_goes_on_after_a_memory_that_is_gone(server: Server, make_package: Make) -> None:
    first, second, third = sorted(server.publish(make_package(seed=seed)) for seed in range(3))
    server.path(second).unlink()
    assert [memory["id"] for memory in server.get(after=second)["data"]] == [third]
    assert [memory["id"] for memory in server.get(after=first)["data"]] == [third]


def test_a_package_that_cannot_be_read_is_listed_as_such(
    server: Server, make_package: Make
) -> None:
    good, bad = server.publish(make_package()), "mem_" + "f" * 32
    server.path(bad).write_bytes(b"no package")
    (server.stores / "acme" / "README").write_text("no package either")
    ours, broken = server.get()["data"]
    assert (ours["id"], ours["error"]) == (good, None)
    assert broken["error"] == f"memory package {bad}.safetensors cannot be used"
    assert (broken["id"], broken["bytes"], broken["tokens"]) == (bad, 10, None)


@pytest.mark.parametrize("moment", ["before its path is looked up", "before it is read"])
def test_a_memory_that_goes_away_while_it_is_listed_is_left_out(
    server: Server, make_package: Make, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    memory = server.publish(make_package())
    monkeypatch.setattr(Store, "ids", lambda self: iter([UNKNOWN, memory]))
    if moment == "before it is read":
        monkeypatch.setattr(Store, "path", lambda self, one: self.folder / f"{one}.safetensors")
    assert [one["id"] for one in server.get()["data"]] == [memory]


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"after": ""}, {"after": "../x"}]
)
def test_an_unusable_page_is_refused(server: Server, query: dict[str, Any]) -> None:
    response = server.call(LIST, **query)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["param"].endswith(next(iter(query)))


# One memory


def test_a_copy_is_exact_and_not_certified(server: Server, tiny_models: tuple[Path, Path]) -> None:
    memory = server.publish(capture(tiny_models[1], "some words", name="notes"))
    answer = server.get(memory)
    manifest = read_manifest(server.path(memory))
    assert answer["manifest"] == manifest.model_dump(mode="json")
    assert (answer["id"], answer["object"], answer["name"]) == (memory, "memory", "notes")
    assert answer["compatibility"] == {
        **{"loadable": True, "wmatrix": None, "prompt_tokens": manifest.tokens},
        **{"retention": 1.0, "basis": "own", "margin": None},
        **{"certified": False, "reason": None, **UNSIGNED},
    }


@pytest.mark.parametrize("retention", [0.875, None])
def test_a_map_is_named_with_what_its_certificate_says(
    server: Server, make_package: Make, wmatrix: WMatrix, retention: float | None
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix, retention)
    server.resolver.tail = 0
    answer = server.get(memory)["compatibility"]
    tokens = server.resolver.resolve_one(memory, "acme").tokens
    assert answer == {
        **{"loadable": True, "wmatrix": "pair.wmatrix", "prompt_tokens": tokens},
        **{"retention": retention, "basis": retention and "measured", "margin": None},
        **{"certified": retention is not None, "reason": None},
        **UNSIGNED,
    }
    assert tokens > 1


def test_a_memory_that_the_model_reads_itself_keeps_all(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix, 0.875)
    tokens = server.resolver.resolve_one(memory, "acme").tokens
    for tail, retention in ((tokens - 1, 0.875), (tokens, 1.0), (tokens + 1, 1.0)):
        server.resolver.tail = tail
        answer = server.get(memory)["compatibility"]
        assert answer["retention"] == retention
        assert answer["basis"] == ("own" if tail >= tokens else "measured")


def test_published_figures_certify_no_map(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix, 0.875)
    (entry,) = server.resolver.registry
    assert entry.certificate is not None
    prior = {"retention": {"mean": 0.91, "ci_low": 0.84, "ci_high": 0.98}, "basis": "prior"}
    manifest = entry.manifest.model_copy(update={"certificate": prior})
    server.resolver.registry = Registry((WMatrixEntry(entry.path, manifest, "e" * 64),))
    server.resolver.tail = 0
    answer = server.get(memory)["compatibility"]
    assert (answer["certified"], answer["retention"]) == (False, None)


def test_a_check_says_what_the_certificate_predicts(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix, 0.875)
    answer = server.call(CHECK, memory).json()
    (entry,) = server.resolver.registry
    tokens = server.tokens(memory)
    expected = predict(entry.certificate, tokens, 16)
    assert (answer["estimated_retention"], answer["tokens"]) == (expected.mean, tokens)
    assert answer["basis"]["digest"] == entry.digest
    assert (answer["memory"], answer["target"]) == (memory, server.resolver.model.geometry.name)


def test_a_running_servers_window_is_not_refused(server: Server, make_package: Make) -> None:
    # Stretched positions may make a window longer than the config's own.
    server.serve(server.resolver, context_length=10**9)
    assert server.call(CHECK, server.publish(make_package())).status_code == 200


def test_a_check_of_a_memory_without_a_map_is_an_answer(server: Server, make_package: Make) -> None:
    answer = server.call(CHECK, server.publish(make_package())).json()
    assert (answer["compatibility_score"], answer["estimated_retention"]) == (0.0, None)
    assert "no W-Matrix leads" in answer["risk_factors"][0]["description"]


UNSIGNED = {"claimed": False, "wmatrix_signed_by": None, "certificate_signed_by": None}
NOTHING = {"loadable": False} | dict.fromkeys(
    ("wmatrix", "prompt_tokens", "retention", "basis", "margin")
)


def unusable(server: Server, memory: str, status: int) -> str:
    """Why a memory cannot be loaded, which all three routes must say alike."""
    answer = server.get(memory)["compatibility"]
    reason = answer.pop("reason")
    assert answer == {**NOTHING, "certified": False, **UNSIGNED}
    response = server.call(LOAD, memory)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(reason)
    report = server.call(CHECK, memory).json()
    assert report["refusal"] == reason
    assert (report["compatibility_score"], report["level"]) == (0.0, "Poor")
    assert (report["estimated_retention"], report["facts"]) == (None, None)
    assert server.engine.calls == []
    return str(reason)


def test_a_memory_without_a_map_cannot_be_loaded(server: Server, make_package: Make) -> None:
    reason = unusable(server, server.publish(make_package()), 422)
    assert "no W-Matrix leads from tiny to target" in reason
    assert "Remedy: fit one" in reason


def test_a_memory_without_text_cannot_be_loaded(server: Server, make_package: Make) -> None:
    memory = server.publish(without_text(make_package()))
    assert "has no text" in unusable(server, memory, 400)


def test_a_memory_that_leaves_no_room_cannot_be_loaded(
    server: Server, make_package: Make, wmatrix: WMatrix
) -> None:
    memory = server.publish(make_package())
    server.add_map(wmatrix)
    tokens = server.tokens(memory)
    server.set_window(tokens + 2)
    assert server.get(memory)["compatibility"]["loadable"]
    server.set_window(tokens + 1)
    assert f"fewer than {tokens + 1} (max_model_len)" in unusable(server, memory, 400)


def test_a_damaged_package_is_refused_and_can_be_evicted(
    server: Server, make_package: Make
) -> None:
    memory = server.publish(make_package())
    content = bytearray(server.path(memory).read_bytes())
    content[-1] ^= 1
    server.path(memory).write_bytes(content)
    for route in (GET, LOAD):
        response = server.call(route, memory)
        assert response.status_code == 422
        assert response.json()["error"]["type"] == "UnprocessableEntityError"
        assert response.json()["error"]["param"] == "memory_id"
        assert memory in response.json()["error"]["message"]
    assert server.engine.calls == []
    assert server.call(DELETE, memory).status_code == 200


def test_a_file_that_is_no_package_under_its_right_name_is_refused(server: Server) -> None:
    # Its bytes are those that the ID names: they were never a package.
    server.stores.joinpath("acme").mkdir(parents=True)
    memory = f"mem_{hashlib.sha256(b'no package').hexdigest()[:32]}"
    server.path(memory).write_bytes(b"no package")
    assert server.call(GET, memory).status_code == 422
    assert server.call(LOAD, memory).status_code == 422


def test_a_package_that_fails_only_when_resolved_is_refused(
    server: Server, make_package: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = server.publish(make_package())

    def broken(self: MemoryResolver, *args: Any) -> Any:
        raise PackageCorrupt("its text is not UTF-8")

    monkeypatch.setattr(MemoryResolver, "resolve", broken)
    assert server.call(GET, memory).status_code == 422


def test_the_routes_are_documented(server: Server) -> None:
    document = server.app.openapi()
    documented = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    expected = {
        ("GET", "/v1/memories"): "MemoryList",
        ("GET", "/v1/memories/{memory_id}"): "MemoryDetail",
        ("GET", "/v1/memories/{memory_id}/compatibility"): "CompatibilityReport",
        ("POST", "/v1/memories/{memory_id}/load"): "MemoryLoad",
        ("POST", "/v1/memories/{memory_id}/edition"): "MemoryEdition",
        ("DELETE", "/v1/memories/{memory_id}"): "MemoryEvicted",
    }
    # The one answer that is no JSON: a file.
    assert documented.pop(("GET", "/v1/memories/{memory_id}/package"))["description"]
    assert documented.keys() == expected.keys()
    for (method, path), name in expected.items():
        operation = documented[method, path]
        assert operation["description"]
        schema = {
            status: answer["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
            for status, answer in operation["responses"].items()
        }
        one = {"404": "ErrorResponse", "422": "ErrorResponse"} if "{" in path else {}
        errors = {"400": "ErrorResponse", "401": "UnauthorizedResponse", "default": "ErrorResponse"}
        assert schema == {"200": name, **errors, **one}
