"""A real server with a trust file: a signed map, signed memories, and a stranger's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from harness import Server, awareness, captured, serving

pytestmark = pytest.mark.engine

TEXT = "The observatory on Mount Kolsass is led by Anna Kowalski. Its dome opens at nine. " * 3


@dataclass(frozen=True)
class Trusting:
    server: Server
    signed: str
    strange: str


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
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("AWARENESS_HOME", str(folder / "elsewhere"))
        signed, strange = (captured(smollm2, text, store) for text in (TEXT, TEXT[::-1]))
    assert awareness("sign", signed, "--store", store, "--key", key).status == 0
    flags = ("--wmatrix", path, "--trust", folder / "trust.json", "--require-signed", "all")
    unsigned = awareness("serve", gemma3, "--store", store, *flags)
    assert (unsigned.status, unsigned.out["error"]["type"]) == (1, "SignatureInvalid")
    assert awareness("sign", path, "--key", key).status == 0
    for server in serving(gemma3, store, folder / "log", *flags):
        yield Trusting(server, signed, strange)


def ask(trusting: Trusting, memory: str) -> httpx.Response:
    body = {"model": "served", "prompt": "\nWho leads it?", "max_tokens": 4, "memory_ids": [memory]}
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
