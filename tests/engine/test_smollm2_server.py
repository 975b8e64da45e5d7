"""SmolLM2 served to two tenants with memories of itself: all APIs, several memories, capture."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from harness import NEAR_TIE, Server, awareness, captured, logprobs_of, parting, serving
from torch import Tensor

from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_manifest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "store"


@pytest.fixture(scope="module")
def own(own_memories: dict[str, tuple[Path, str]], store: Path) -> tuple[str, str]:
    package, text = own_memories["smollm2-135m"]
    store.mkdir()
    shutil.copy(package, store)
    return package.stem, text


def from_itself(learned: WMatrix) -> WMatrix:
    """A map of the same shape from the target itself, which reads nothing of its states."""
    manifest = learned.manifest
    layers = tuple(range(len(manifest.layers)))
    other = manifest.model_copy(update={"source": manifest.target, "layers": layers})

    def blank(rows: Tensor, value: float) -> Tensor:
        states = rows.new_full((other.source_width, *rows.shape[1:]), value)
        return torch.cat([states, rows[manifest.source_width :]])

    return replace(
        learned,
        manifest=other,
        mean=blank(learned.mean, 0),
        scale=blank(learned.scale, 1),
        encode=blank(learned.encode, 0),
    )


@pytest.fixture(scope="module")
def server(smollm2: Path, store: Path, wmatrix: Path, own: tuple[str, str]) -> Iterator[Server]:
    """Given a W-Matrix from Gemma-3 that leads to Gemma-3, not to the served model."""
    elsewhere = store.parent / "elsewhere.wmatrix"
    from_itself(load(wmatrix)).save(elsewhere)
    tenants = store.parent / "tenants.json"
    home = {"api_keys": ["none"], "store": str(store)}  # the key that harness's client has
    tenants.write_text(json.dumps({"home": home, "other": {"api_keys": ["x"], "store": "other"}}))
    flags = ("--wmatrix", elsewhere, "--tenants", tenants, "--pin", own[0], "--allow-capture")
    flags += ("--enable-server-load-tracking",)
    log, stored = store.parent / "server.log", {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    yield from serving(smollm2, store, log, *flags, **stored)


def post(server: Server, path: str, key: str = "none", **body: object) -> httpx.Response:
    """One request as its bytes, greedy, of few tokens."""
    return httpx.post(
        f"{server.url}{path}",
        json={"model": "served", "temperature": 0, **body},
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
    )


def test_same_model_greedy_is_native(server: Server, own: tuple[str, str]) -> None:
    memory, text = own
    gaps = [
        server.differs_from_native(text, question, memory)
        for question in ("\n\nIn short, the text says that the", " The")
    ]
    assert max(gaps) <= NEAR_TIE, gaps


def test_chat_reads_the_memory(server: Server, own: tuple[str, str]) -> None:
    """The answer changes with the memory, streams the same, and costs no prefill of the memory."""
    messages = [{"role": "user", "content": "Which project is the text about? Answer in a word."}]

    def chat(**more: object) -> openai.types.chat.ChatCompletion:
        return server.client.chat.completions.create(
            model="served", messages=messages, max_tokens=24, temperature=0, **more
        )

    chat(extra_body={"memory_ids": [own[0]]})  # the next ones find the same blocks
    plain, memory = chat(), chat(extra_body={"memory_ids": [own[0]]})
    assert memory.usage.prompt_tokens > plain.usage.prompt_tokens + 300
    assert memory.choices[0].message.content != plain.choices[0].message.content
    stream = chat(extra_body={"memory_ids": [own[0]]}, stream=True)
    streamed = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert streamed == memory.choices[0].message.content
    assert chat().choices[0].message.content == plain.choices[0].message.content


CHAT = {"messages": [{"role": "user", "content": "Which project is this about?"}], "max_tokens": 16}


def test_a_chats_memory_stands_in_the_first_turn(server: Server, own: tuple[str, str]) -> None:
    memory = post(
        server,
        "/v1/chat/completions",
        **CHAT,
        memory_ids=[own[0]],
        return_token_ids=True,
        cache_salt="a caller",
    ).json()
    text = post(server, "/detokenize", tokens=memory["prompt_token_ids"]).json()["prompt"]
    head, _, rest = text.partition(own[1])
    assert head.endswith("user\n")
    assert rest.startswith("\n\nWhich project is this about?")
    assert memory["memory"]["loaded_tokens"] > 380  # with the head before it


def test_all_apis_say_the_same(server: Server, own: tuple[str, str]) -> None:
    question = CHAT["messages"][0]["content"]
    ids = {"memory_ids": [own[0]]}
    post(server, "/v1/chat/completions", **CHAT, **ids)  # the next ones find the same blocks
    chat = post(server, "/v1/chat/completions", **CHAT, **ids)
    responses = post(server, "/v1/responses", input=question, max_output_tokens=16, **ids)
    messages = post(server, "/v1/messages", **CHAT, **ids)
    said = chat.json()["choices"][0]["message"]["content"]
    assert responses.json()["output"][0]["content"][0]["text"] == said
    assert messages.json()["content"][0]["text"] == said
    for response in (chat, responses, messages):
        assert response.headers["x-awareness-memories"] == own[0]
        report = response.json()["memory"]
        assert (report["plan"], report["retention"]) == ("load", [None])
        assert report["temperature"] in ("warm", "hot")  # pinned: never cold


def test_counts_of_tokens_agree(server: Server, own: tuple[str, str]) -> None:
    ids = {"memory_ids": [own[0]]}
    answer = post(server, "/v1/messages", **CHAT, **ids)
    counted = post(server, "/v1/messages/count_tokens", messages=CHAT["messages"], **ids)
    assert counted.json()["input_tokens"] == answer.json()["usage"]["input_tokens"] > 400
    assert counted.headers["x-awareness-tokens"] == answer.headers["x-awareness-tokens"]
    plain, memory = (
        post(server, "/v1/completions", prompt=" It", max_tokens=1, **body) for body in ({}, ids)
    )
    added = memory.json()["usage"]["prompt_tokens"] - plain.json()["usage"]["prompt_tokens"]
    detail = httpx.get(
        f"{server.url}/v1/memories/{own[0]}", headers={"Authorization": "Bearer none"}
    )
    assert detail.json()["compatibility"]["prompt_tokens"] == added
    assert memory.headers["x-awareness-tokens"] == str(added)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", {"extra_body": {"memory_ids": ["ID"]}}),
        ("/v1/chat/completions", {"memory_id": "ID"}),
        ("/v1/responses", {"memories": ["ID"]}),
        ("/v1/messages", {"metadata": {"memory_ids": "ID"}}),
        ("/generative_scoring", {"memory_ids": ["ID"]}),
        ("/tokenize", {"memory_ids": ["ID"]}),
    ],
)
def test_a_field_where_nobody_reads_it_is_refused(
    server: Server, own: tuple[str, str], path: str, field: dict
) -> None:
    # vLLM's own responses take a prompt for a template.
    prompt = {"input": "hi"} if path == "/v1/responses" else {"prompt": "hi", **CHAT}
    body = json.dumps({**prompt, **field}).replace("ID", own[0])
    refused = post(server, path, **json.loads(body))
    assert refused.status_code == 400, refused.text
    assert "memory_ids" in refused.text


def test_a_stored_response_says_that_it_had_a_memory(server: Server, own: tuple[str, str]) -> None:
    said = post(
        server, "/v1/responses", input="hi", max_output_tokens=4, memory_ids=[own[0]]
    ).json()
    headers = {"Authorization": "Bearer none"}
    kept = httpx.get(f"{server.url}/v1/responses/{said['id']}", headers=headers).json()
    assert kept["metadata"]["memory_ids"] == own[0]
    more = {"input": "go on", "max_output_tokens": 4}
    refused = post(server, "/v1/responses", **more, previous_response_id=said["id"])
    assert (refused.status_code, "memory_ids" in refused.text) == (400, True), refused.text
    plain = post(server, "/v1/responses", input="hi", max_output_tokens=4).json()
    goes_on = post(server, "/v1/responses", **more, previous_response_id=plain["id"])
    assert goes_on.status_code == 200, goes_on.text


def test_the_gauge_of_requests_under_way_goes_back(server: Server, own: tuple[str, str]) -> None:
    def load() -> int:
        return httpx.get(f"{server.url}/load").json()["server_load"]

    before = load()
    ids = {"memory_ids": [own[0]]}
    post(server, "/v1/completions", prompt=" It", max_tokens=1, **ids)
    post(server, "/v1/completions", prompt="It is so.", max_tokens=1, memory={"capture": "c"})
    post(server, "/v1/messages", **CHAT, **ids)
    assert load() == before


def test_streams_say_what_was_used_in_headers(server: Server, own: tuple[str, str]) -> None:
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"model": "served", "prompt": "It", "stream": True, "memory_ids": [own[0]]},
        headers={"Authorization": "Bearer none"},
    ) as response:
        assert response.headers["x-awareness-retention"] == "1.000"
        assert "X-Awareness-Retention" in response.headers["access-control-expose-headers"]
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_several_memories_are_read_in_their_order(
    server: Server, own: tuple[str, str], document: Callable[[int, int], str]
) -> None:
    text = document(150, 20)
    answer = post(server, "/v1/completions", prompt=text, max_tokens=1, memory={"capture": "b"})
    second = answer.json()["memory"]["id"]

    def ask(*ids: str) -> httpx.Response:
        body = {"prompt": " The", "max_tokens": 8, "logprobs": 5, "memory_ids": ids}
        return post(server, "/v1/completions", **body)

    question = 1
    parts = [ask(one).json()["usage"]["prompt_tokens"] - question for one in (own[0], second)]
    for ids in ((own[0], second), (second, own[0])):
        answer, again = ask(*ids), ask(*ids)
        assert answer.json()["usage"]["prompt_tokens"] == sum(parts) + question
        assert answer.json()["memory"]["ids"] == list(ids)
        assert answer.json()["memory"]["loaded_tokens"] >= sum(parts) - 8
        assert again.json()["memory"]["temperature"] == "hot"
        assert parting(logprobs_of(answer), logprobs_of(again)) <= NEAR_TIE


def test_what_a_server_has_computed_becomes_a_memory(
    server: Server, store: Path, document: Callable[[int, int], str]
) -> None:
    text = document(300, 3)
    body = {"prompt": text, "max_tokens": 8, "logprobs": 5, "memory": {"capture": "mine"}}
    answer = post(server, "/v1/completions", **body)
    memory = answer.json()["memory"]["id"]
    assert answer.headers["x-awareness-captured"] == memory
    assert parting(server.logprobs(text, 8), logprobs_of(answer)) <= NEAR_TIE
    manifest = awareness("inspect", memory, "--store", store).out
    assert (manifest["name"], manifest["engine"]) == ("mine", "vllm")
    assert awareness("verify", memory, "--store", store).out["ok"] is True
    assert server.differs_from_native(text, "\n\nIn short, the", memory) <= NEAR_TIE
    from_the_prefix_cache = post(server, "/v1/completions", **body).json()["memory"]["id"]
    assert server.differs_from_native(text, "\n\nIn short, the", from_the_prefix_cache) <= NEAR_TIE


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["two", "texts"]}),
        ("/v1/completions", {"prompt": "a stream", "stream": True}),
        ("/v1/completions", {"prompt": "two answers", "n": 2}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/chat/completions", CHAT),
    ],
)
def test_what_cannot_be_captured_is_refused(server: Server, path: str, body: dict) -> None:
    refused = post(server, path, **body, memory={"capture": "name"})
    assert refused.status_code == 400, refused.text


def test_another_tenants_memory_looks_like_an_unknown_one(
    server: Server, own: tuple[str, str]
) -> None:
    unknown = "mem_" + "0" * 32
    for path, body in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", CHAT)):
        foreign, missing = (
            post(server, path, "x", **body, memory_ids=[memory]) for memory in (own[0], unknown)
        )
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace(own[0], unknown) == missing.text
        assert post(server, path, "nobody", **body, memory_ids=[own[0]]).status_code == 401
        assert post(server, path, "nobody", **body).status_code == 401
    anthropics = {"x-api-key": "none"}, {"x-api-key": "nobody"}
    found = [
        httpx.post(f"{server.url}/v1/messages", json={"model": "served", **CHAT}, headers=headers)
        for headers in anthropics
    ]
    assert [answer.status_code for answer in found] == [200, 401]
    assert found[1].json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_time_does_not_tell_a_foreign_memory_from_an_unknown_one(
    server: Server, own: tuple[str, str]
) -> None:
    seconds: dict[str, list[float]] = {own[0]: [], "mem_" + "0" * 32: []}
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer x"}) as client:
        for _ in range(200):
            for memory, found in seconds.items():
                began = time.perf_counter()
                body = {"model": "served", "prompt": "hi", "memory_ids": [memory]}
                assert client.post("/v1/completions", json=body).status_code == 404
                found.append(time.perf_counter() - began)
    foreign, unknown = (statistics.median(found) for found in seconds.values())
    print(f"refused in {1e3 * foreign:.2f} ms, were it foreign, or {1e3 * unknown:.2f}, unknown")
    assert 0.5 < foreign / unknown < 2


def test_memories_are_listed_loaded_and_evicted(
    server: Server, own: tuple[str, str], document: Callable[[int, int], str]
) -> None:
    def call(method: str, path: str, key: str = "none") -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.request(method, f"{server.url}/v1/memories{path}", headers=headers, timeout=60)

    assert own[0] in [memory["id"] for memory in call("GET", "?limit=1000").json()["data"]]
    assert call("GET", "", "x").json()["data"] == []
    detail = call("GET", f"/{own[0]}").json()
    assert (detail["compatibility"]["loadable"], detail["compatibility"]["retention"]) == (
        True,
        1.0,
    )
    body = {"prompt": document(100, 5), "max_tokens": 1, "memory": {"capture": "another"}}
    other = post(server, "/v1/completions", **body).json()["memory"]["id"]
    assert call("POST", f"/{other}/load").json()["temperature"] == "cold"
    assert call("POST", f"/{other}/load").json()["temperature"] == "warm"
    assert call("DELETE", f"/{other}").json()["evicted"] is True
    assert call("DELETE", f"/{other}").json()["evicted"] is False
    assert call("DELETE", f"/{own[0]}").json()["evicted"] is False  # it is pinned
    assert call("POST", f"/{own[0]}/load").json()["temperature"] == "warm"
    assert call("POST", f"/{own[0]}/load", "x").status_code == 404


def test_loads_are_counted_on_vllms_own_metrics(server: Server, own: tuple[str, str]) -> None:
    def loads() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        lines = [
            line for line in text.splitlines() if line.startswith("vllm:awareness_loads_total")
        ]
        return sum(float(line.split()[-1]) for line in lines)

    before = loads()
    post(server, "/v1/completions", prompt=" It", memory_ids=[own[0]], cache_salt="counted")
    assert loads() == before + 1


def test_chat_refuses_what_completions_refuse(server: Server, own: tuple[str, str]) -> None:
    for body, code in (
        ({"memory_ids": ["mem_" + "f" * 32]}, 404),
        ({"memory_ids": ["mem_/../x"]}, 400),
        ({"memory_ids": [own[0]], "prompt_logprobs": 1}, 400),
        ({"memory_ids": [own[0]], "echo": True}, 400),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            server.client.chat.completions.create(
                model="served", messages=[{"role": "user", "content": "hi"}], extra_body=body
            )
        assert caught.value.status_code == code, str(caught.value)
        assert "Remedy" in str(caught.value)


def test_a_wmatrix_for_another_target(server: Server, gemma3: Path, store: Path) -> None:
    memory = captured(gemma3, "A memory that this server has no way to read.", store)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        server.complete("hi there", memory_ids=[memory])
    message = str(caught.value)
    assert "(elsewhere.wmatrix)" in message
    assert "from gemma3-270m to smollm2-135m" in message
    assert "awareness fit" in message
    assert server.complete("The capital of France is", 2)


def test_cli_knows_what_was_captured(own: tuple[str, str], store: Path, wmatrix: Path) -> None:
    memory, _text = own
    listed = awareness("list", "--store", store).out["memories"]
    assert memory in [row["id"] for row in listed]
    manifest = awareness("inspect", memory, "--store", store).out
    assert (manifest["kind"], manifest["engine"]) == ("memory", "vllm")
    assert awareness("verify", memory, "--store", store).out["ok"] is True
    inspected = awareness("inspect", wmatrix).out
    certified = read_manifest(wmatrix).certificate is not None
    assert (inspected["kind"], inspected["certified"]) == ("wmatrix", certified)
    assert awareness("verify", wmatrix).out["ok"] is True
    refused = awareness("verify", "mem_" + "0" * 32, "--store", store)
    assert (refused.status, refused.out["error"]["type"]) == (1, "MemoryNotFound")
