"""A thousand hostile requests to one server: all are refused, none leaves a trace."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import Server, captured, serving
from hostile import (
    ANTHROPIC,
    CANNOT_BE_CARRIED,
    CHAT,
    COMPLETIONS,
    MEMORY,
    PATHS,
    PLAIN,
    REFUSED,
    REQUESTS,
    RESPONSES,
    TEXT,
    Answer,
    Case,
    asking,
    deep_in_message,
    nested,
    text_of,
    thousand,
)

from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.connector.worker_extension import CALL
from awareness_vllm.serving.params import LoadParams

pytestmark = pytest.mark.engine

CONNECTIONS = 8
SECONDS = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def memory(smollm2: Path, folder: Path) -> str:
    return captured(smollm2, TEXT, folder / "store")


@pytest.fixture(scope="module")
def server(smollm2: Path, memory: str, folder: Path) -> Iterator[Server]:
    """In float32: requests that are answered together are then not rounded differently. In vLLM's
    development mode, with captures: there is more to attack."""
    flags = ("--dtype", "float32", "--allow-capture")
    log = folder / "server.log"
    yield from serving(smollm2, folder / "store", log, *flags, VLLM_SERVER_DEV_MODE="1")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=CONNECTIONS)
    with httpx.Client(base_url=server.url, timeout=SECONDS, limits=limits) as client:
        yield client


@dataclass(frozen=True)
class Storm:
    """All answers, and what the server said and the store held before and after."""

    answers: list[Answer]
    said: tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]
    files: tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def storm(client: httpx.Client, memory: str, folder: Path) -> Storm:
    loot = folder / "loot"
    loot.mkdir()
    cases = thousand(memory, loot)
    said, files = spoken(client, memory), contents(folder)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = list(pool.map(lambda case: sent(client, case), cases))
    return Storm(answers, (said, spoken(client, memory)), (files, contents(folder)))


def sent(client: httpx.Client, case: Case) -> Answer:
    """The answer to a request; status 0 where none came, or not in time."""
    try:
        found = client.request(case.method, case.path, content=case.body, headers=case.headers)
    except httpx.HTTPError as error:
        return Answer(case, 0, repr(error))
    return Answer(case, found.status_code, found.text)


def spoken(client: httpx.Client, memory: str) -> dict[tuple[str, str], str]:
    """What each API answers, plainly and from the memory."""
    said = {}
    for path in PATHS:
        for expect, fields in ((PLAIN, {}), (MEMORY, {"memory_ids": [memory]})):
            answer = sent(client, asking(path, expect, **fields))
            assert answer.status == 200, answer
            said[path, expect] = text_of(path, json.loads(answer.text))
    return said


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but the server's log."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_right(answer: Answer, said: dict[tuple[str, str], str]) -> bool:
    """Whether a request got what its case says."""
    if 400 <= answer.status < 500:
        return True
    if answer.status != 200 or answer.case.expect == REFUSED:
        return False
    path = answer.case.path
    return text_of(path, json.loads(answer.text)) == said[path, answer.case.expect]


def complaint(wrong: list[Answer]) -> str:
    """The first wrong answers, with the requests that got them."""
    lines = [f"{a.status}: {a.case}\n    → {a.text[:400]}" for a in wrong[:20]]
    counts = Counter(a.status for a in wrong)
    return "\n".join([f"{len(wrong)} wrong answers, by status {dict(counts)}", *lines])


def test_every_hostile_request_is_refused(storm: Storm) -> None:
    assert len(storm.answers) == REQUESTS
    wrong = [answer for answer in storm.answers if not is_right(answer, storm.said[0])]
    assert not wrong, complaint(wrong)


def test_some_of_each_kind_were_sent(storm: Storm) -> None:
    """The generator still does what it is for."""
    statuses = Counter(a.status for a in storm.answers if a.case.expect == REFUSED)
    assert {400, 404} <= set(statuses), statuses
    assert any(a.status == 200 for a in storm.answers if a.case.expect == PLAIN)
    assert any(a.status == 200 for a in storm.answers if a.case.expect == MEMORY)


def test_the_server_answers_as_before(storm: Storm, server: Server) -> None:
    before, after = storm.said
    assert before == after
    assert all(before[path, PLAIN] != before[path, MEMORY] for path in PATHS), before
    assert server.process.poll() is None
    assert server.client.models.list().data


def test_nothing_was_written(storm: Storm, memory: str) -> None:
    before, after = storm.files
    assert before == after
    assert f"store/{memory}.safetensors" in after


def test_no_route_ignores_memories(client: httpx.Client, storm: Storm, memory: str) -> None:
    """vLLM has more routes that take a prompt. One that knows nothing of memories must refuse them,
    or it would answer as if they had been read; and it must not load what a client made up."""
    asked = sent(client, replace(asking(COMPLETIONS, memory_ids=[memory]), path="/invocations"))
    right = asked.status == 200 and storm.said[0][COMPLETIONS, MEMORY] in asked.text
    assert right or 400 <= asked.status < 500, complaint([asked])
    ids = client.post("/tokenize", json={"model": "served", "prompt": TEXT}).json()["tokens"]
    params = LoadParams.model_validate(
        {"parts": [{"memory": memory, "digest": digest_in(memory), "tokens": len(ids)}]}
    )
    for path in ("/invocations", COMPLETIONS):
        forged = asking(
            COMPLETIONS,
            prompt=[*ids, *ids[:20]],
            cache_salt=params.cache_salt,
            kv_transfer_params={"awareness": params.model_dump(mode="json")},
        )
        answer = sent(client, replace(forged, path=path))
        assert "loaded_tokens" not in answer.text, complaint([answer])
        assert answer.status < 500, complaint([answer])


@pytest.mark.parametrize("method", ["announce", "awareness_announce", CALL])
def test_nobody_else_calls_the_workers(
    server: Server, client: httpx.Client, folder: Path, memory: str, method: str
) -> None:
    """vLLM's development mode offers its own `collective_rpc` to everybody."""

    def rpc(**body: object) -> int:
        # vLLM closes the connection after such an error: each call has one of its own.
        return httpx.post(f"{server.url}/collective_rpc", json=body, timeout=SECONDS).status_code

    assert rpc(method="synchronize_device") == 200
    loot = str(folder / "loot.safetensors")
    key = "k" * 32
    for args in ([key, loot], ["announce", [key, loot], ""], ["announce", [key, loot], "0" * 64]):
        assert rpc(method=method, args=args) >= 400
    for name in (key, loot, f":{loot}", "0" * 64 + f":{loot}"):
        params = {"kv_transfer_params": {"awareness_capture": name}}
        for path in ("/inference/v1/generate", "/invocations", COMPLETIONS):
            sent(client, replace(asking(COMPLETIONS, **params), path=path))
    assert not Path(loot).exists()
    assert sent(client, asking(COMPLETIONS, memory_ids=[memory])).status == 200


@pytest.mark.parametrize("fields", CANNOT_BE_CARRIED, ids=ascii)
@pytest.mark.parametrize("with_memory", [True, False])
def test_what_cannot_be_carried(
    client: httpx.Client, storm: Storm, memory: str, fields: dict[str, Any], with_memory: bool
) -> None:
    usable = {"memory_ids": [memory]} if with_memory else {}
    expect = MEMORY if with_memory else PLAIN
    answers = [sent(client, asking(path, expect, **usable, **fields)) for path in PATHS]
    wrong = [answer for answer in answers if not is_right(answer, storm.said[0])]
    assert not wrong, complaint(wrong)


@pytest.mark.parametrize("with_memory", [True, False])
@pytest.mark.parametrize(
    ("path", "where"),
    [
        (RESPONSES, lambda deep: {"unknown": deep}),
        (CHAT, deep_in_message),
        (ANTHROPIC, deep_in_message),
        (COMPLETIONS, lambda deep: {"kv_transfer_params": {"x": deep}}),
    ],
)
def test_nesting(
    client: httpx.Client,
    storm: Storm,
    memory: str,
    path: str,
    where: Callable[[Any], dict[str, Any]],
    with_memory: bool,
) -> None:
    """After all others: stock vLLM 0.32 takes the last of these and its engine dies of it."""
    usable = {"memory_ids": [memory]} if with_memory else {}
    answer = sent(client, nested(path, where, **usable))
    assert 200 <= answer.status < 500, complaint([answer])
    alive = sent(client, asking(COMPLETIONS, memory_ids=[memory]))
    assert alive.status == 200, complaint([answer, alive])
