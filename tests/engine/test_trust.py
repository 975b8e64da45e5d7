"""A real server with a trust file: a signed map, signed memories, and a stranger's; two front ends,
and a real registry with further memories."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from harness import Server, assert_same, awareness, captured, serving
from registry_server import registry_server

pytestmark = pytest.mark.engine

FRONT_ENDS = 2
TEXT = "The observatory on Mount Kolsass is led by Anna Kowalski. Its dome opens at nine. " * 3


@dataclass(frozen=True)
class Trusting:
    """`signed` and `strange` are in the server's store, `remote` and `unsigned` in the registry."""

    server: Server
    store: Path
    signed: str
    strange: str
    remote: str
    unsigned: str
    cache: Path


@pytest.fixture(scope="module")
def trusting(
    smollm2: Path, gemma3: Path, wmatrix: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trusting]:
    """A server of the target that wants all signed; two memories that another home captured."""
    folder = tmp_path_factory.mktemp("trust")
    store, path = folder / "store", folder / "pair.wmatrix"
    shutil.copy(wmatrix, path)
    key = awareness("keygen", folder / "alice").out["private_key"]
    entry = {"public_key": "alice.pub", "roles": ["package", "wmatrix", "certificate"]}
    (folder / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    away = folder / "away"
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("AWARENESS_HOME", str(folder / "elsewhere"))
        signed, strange = (captured(smollm2, text, store) for text in (TEXT, TEXT[::-1]))
        remote, unsigned = (captured(smollm2, text, away) for text in (TEXT[9:], TEXT[10:]))
    assert awareness("sign", signed, "--store", store, "--key", key).status == 0
    assert awareness("sign", remote, "--store", away, "--key", key).status == 0
    flags = ("--wmatrix", path, "--trust", folder / "trust.json", "--require-signed", "all")
    refused = awareness("serve", gemma3, "--store", store, *flags)
    assert (refused.status, refused.out["error"]["type"]) == (1, "SignatureInvalid")
    assert awareness("sign", path, "--key", key).status == 0
    with registry_server(folder / "registry") as registry:
        where, own_home = registry.reference(), {"AWARENESS_HOME": str(folder / "home")}
        for memory in (remote, unsigned):
            assert awareness("push", away / f"{memory}.safetensors", where).status == 0
        flags += ("--registry", where, "--api-server-count", FRONT_ENDS)
        for server in serving(gemma3, store, folder / "log", *flags, **own_home):
            cache = folder / "home" / "cache" / "served"
            yield Trusting(server, store, signed, strange, remote, unsigned, cache)


def ask(trusting: Trusting, memory: str, salt: str = "salt") -> httpx.Response:
    body = {"model": "served", "prompt": "\nWho leads it?", "max_tokens": 4, "memory_ids": [memory]}
    body |= {"temperature": 0, "logprobs": 3, "cache_salt": salt}
    return httpx.post(f"{trusting.server.url}/v1/completions", json=body, timeout=120)


def test_a_signed_memory_is_served_and_its_signers_are_named(trusting: Trusting) -> None:
    response = ask(trusting, trusting.signed)
    assert response.status_code == 200, response.text
    memory = response.json()["memory"]
    assert (memory["plan"], memory["origin"]) == ("load", ["signed"])
    assert memory["loaded_tokens"]
    assert memory["signed_by"] == [{"package": "alice", "wmatrix": "alice", "certificate": None}]


def test_an_unsigned_memory_is_refused_and_the_server_goes_on(trusting: Trusting) -> None:
    response = ask(trusting, trusting.strange)
    assert response.status_code == 422
    assert trusting.strange in response.json()["error"]["message"]
    assert ask(trusting, trusting.signed).status_code == 200
    listed = httpx.get(f"{trusting.server.url}/v1/memories").json()["data"]
    assert {one["id"]: one["signed_by"] for one in listed} == {
        trusting.signed: "alice",
        trusting.strange: None,
    }


def test_front_ends_pull_a_memory_at_once_and_answer_as_from_a_local_one(
    trusting: Trusting,
) -> None:
    """Its signature comes with it. The kernel deals the requests out to both front ends."""
    memory = trusting.remote
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(trusting, memory), range(8)))
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    reports = [answer.json()["memory"] for answer in answers]
    assert {(r["plan"], *r["origin"]) for r in reports} == {("load", "signed")}
    assert "cold" in {report["temperature"] for report in reports}
    pulled = [f"pulled {memory}" in line for line in trusting.server.log.read_text().splitlines()]
    assert 1 <= sum(pulled) <= FRONT_ENDS
    (file,) = trusting.cache.glob("*/mem_*.safetensors")
    assert not (trusting.store / file.name).exists()

    metrics = httpx.get(f"{trusting.server.url}/metrics").text
    counted = re.findall(r"^vllm:awareness_pull_seconds_count(?:{.*})? (\S+)$", metrics, re.M)
    assert sum(map(float, counted)) == sum(pulled)
    alone = ask(trusting, memory, "alone").json()
    for path in (file, file.with_name(f"{file.name}.sig")):
        shutil.copy(path, trusting.store)
    httpx.delete(f"{trusting.server.url}/v1/memories/{memory}").raise_for_status()
    local = ask(trusting, memory, "local")
    report = local.json()["memory"]
    assert (report["plan"], report["temperature"]) == ("load", "cold")
    assert alone["choices"] == local.json()["choices"]
    # In a batch a logit's last bits depend on the other requests.
    for answer in answers:
        assert_same(local, answer)


def test_an_unsigned_memory_of_the_registry_is_not_pulled(trusting: Trusting) -> None:
    response = ask(trusting, trusting.unsigned)
    assert response.status_code == 422, response.text
    assert "not signed" in response.json()["error"]["message"]
    assert not [*trusting.cache.glob(f"*/{trusting.unsigned}*")]
