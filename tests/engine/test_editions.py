"""Editions: from the request after it is there, a memory is what the model's own reading is.

The servers compute in float32, where what is exact agrees to 0.0001 nats. In bfloat16 the model's
own readings, in chunks of other sizes, differ by 0.1: rounding would hide a fault, or look like one
(`benchmarks/exactness.py` counts how often).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from harness import Server, captured, parting, serving
from openai.types.completion_choice import Logprobs
from servers import CHAT_TEMPLATE

pytestmark = pytest.mark.engine

EXACT = 0.001
"""Nats. Genuine differences in float32 are a hundredth of it."""
FLOAT32 = ("--dtype", "float32")
QUESTION = "\n\nIn short, the text says that the"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("editions") / "store"


def flags_of(store: Path, wmatrix: Path) -> tuple[object, ...]:
    return (
        *("--editions", "idle", "--wmatrix", wmatrix, "--disk-cache", store.parent / "disk"),
        *("--trust-request-chat-template", "--allow-capture", *FLOAT32),
    )


@pytest.fixture(scope="module")
def server(gemma3: Path, store: Path, wmatrix: Path) -> Iterator[Server]:
    yield from serving(gemma3, store, store.parent / "server.log", *flags_of(store, wmatrix))


@pytest.fixture(scope="module")
def texts(document: Callable[[int, int], str]) -> tuple[str, str]:
    """One longer than Gemma-3's window and than several chunks, one shorter."""
    return document(900, 1), document(300, 4)


@pytest.fixture(scope="module")
def foreign(smollm2: Path, store: Path, texts: tuple[str, str]) -> tuple[str, str]:
    """Memories of SmolLM2."""
    one, two = (captured(smollm2, text, store) for text in texts)
    return one, two


def ask(server: Server, path: str = "completions", **fields: object) -> dict:
    """A greedy answer of 64 tokens, with what was likely at each, and its prompt's ids."""
    body = {"model": "served", "max_tokens": 64, "temperature": 0, "return_token_ids": True}
    body |= {"logprobs": True, "top_logprobs": 5} if path != "completions" else {"logprobs": 5}
    url = f"{server.url}/v1/{path}"
    return httpx.post(url, json={**body, **fields}, timeout=120).raise_for_status().json()


def chat(server: Server, **fields: object) -> dict:
    messages = [{"role": "user", "content": QUESTION}]
    return ask(server, "chat/completions", messages=messages, chat_template=CHAT_TEMPLATE, **fields)


def logprobs(answer: dict) -> Logprobs:
    """Those of an answer, a chat's in the form of a completion's."""
    given = answer["choices"][0]["logprobs"]
    if "content" not in given:
        return Logprobs(**given)
    content = given["content"]
    tops = [{t["token"]: t["logprob"] for t in one["top_logprobs"]} for one in content]
    return Logprobs(tokens=[one["token"] for one in content], top_logprobs=tops)


def from_native(server: Server, answer: dict) -> float:
    """How far an answer is from that to the same ids, read natively: the gap where they part, else
    the greatest difference in what a token's log probability is."""
    ids = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
    native, given = logprobs(ask(server, prompt=ids)), logprobs(answer)
    assert native.tokens
    tops = zip(native.tokens, native.top_logprobs, given.top_logprobs, strict=True)
    return parting(native, given) or max(abs(ours[t] - theirs[t]) for t, ours, theirs in tops)


def until_exact(request: Callable[..., dict], seconds: float = 240) -> None:
    """Send a request until all editions are there for it."""
    until = time.monotonic() + seconds
    while not all((memory := request(max_tokens=1)["memory"])["edition"]):
        assert time.monotonic() < until, memory
        time.sleep(0.5)


def test_a_memory_is_exact_from_the_request_after_its_edition(
    server: Server, foreign: tuple[str, str]
) -> None:
    def request(**fields: object) -> dict:
        return ask(server, prompt=QUESTION, memory_ids=[foreign[0]], **fields)

    first = request(max_tokens=1)["memory"]
    assert (first["edition"], first["basis"] == ["own"]) == ([False], False)
    until_exact(request)
    answer = request()
    memory = answer["memory"]
    assert (memory["plan"], memory["native_tail"]) == ("load", 0)
    assert any("900 tokens, warm" in line or "901 tokens, warm" in line for line in server.loads())
    assert (memory["retention"], memory["basis"]) == ([1.0], ["own"])
    assert from_native(server, answer) <= EXACT
    listed = httpx.get(f"{server.url}/v1/memories/{foreign[0]}").raise_for_status().json()
    assert listed["edition"]


def test_in_a_chat_and_after_another_memory(server: Server, foreign: tuple[str, str]) -> None:
    def request(**fields: object) -> dict:
        return chat(server, memory_ids=list(foreign), **fields)

    until_exact(request)
    answer = request()
    assert answer["memory"]["retention"] == [1.0, 1.0]
    assert from_native(server, answer) <= EXACT


def test_a_copy_in_a_chat_becomes_exact_and_stays_so_for_the_next_server(
    smollm2: Path, own_memories: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """SmolLM2's own memory, captured for the beginning of a prompt; it has a chat template."""
    package, _ = own_memories["smollm2-135m"]
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(package, store)
    flags = ("--editions", "idle", "--disk-cache", tmp_path / "disk", *FLOAT32)

    def request(server: Server, **fields: object) -> dict:
        messages = [{"role": "user", "content": QUESTION}]
        fields |= {"memory_ids": [package.stem]}
        return ask(server, "chat/completions", messages=messages, **fields)

    start = contextlib.contextmanager(serving)
    with start(smollm2, store, tmp_path / "first.log", *flags) as server:
        before = request(server, max_tokens=1)["memory"]
        assert (before["edition"], before["retention"]) == ([False], [None])
        until_exact(functools.partial(request, server))
        assert from_native(server, request(server)) <= EXACT
        (kept,) = httpx.get(f"{server.url}/v1/memories").raise_for_status().json()["data"]
        assert kept["edition"]
    with start(smollm2, store, tmp_path / "second.log", *flags) as server:
        answer = request(server)
        memory = answer["memory"]
        assert (memory["edition"], memory["temperature"]) == ([True], "warm")
        assert from_native(server, answer) <= EXACT
        assert httpx.delete(f"{server.url}/v1/memories/{package.stem}").json()["evicted"]
        assert not list((tmp_path / "disk").glob("*.aligned"))
        assert request(server, max_tokens=1)["memory"]["edition"] == [False]
