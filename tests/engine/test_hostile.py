"""A thousand hostile requests to one server: all are refused, none leaves a trace."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from harness import Server, captured, serving

from awareness_vllm.serving.params import LoadParams

pytestmark = pytest.mark.engine

REQUESTS = 1000
CONNECTIONS = 8
SECONDS = 30.0
TEXT = """The lighthouse at Cape Verity was built in 1871 by Anna Rask. Its lamp burned whale oil
until 1904, when the keeper, Jonas Feld, put in an electric arc. The tower is 43 metres high and has
211 steps. In winter the keeper's family lived in the village and he stayed alone on the rock."""
# More than MIN_COMPUTED tokens, so that there is something that a forged load could replace.
QUESTION = "Here is a text. Repeat the first sentence of the text above."
MESSAGES = [{"role": "user", "content": QUESTION}]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"
BASES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": QUESTION, "max_tokens": 3},
    CHAT: {"messages": MESSAGES, "max_tokens": 3},
    RESPONSES: {"input": QUESTION, "max_output_tokens": 3},
    ANTHROPIC: {"messages": MESSAGES, "max_tokens": 3},
}
PATHS = tuple(BASES)
UNKNOWN = "mem_" + "0" * 32
TOO_DEEP = 500
"""Levels of nesting: json.loads takes nearly a thousand, deepcopy a third, pickle half of that."""

REFUSED = "refused"
PLAIN = "refused, or answered as if nothing had been forged"
MEMORY = "refused, or answered from the memory that it names"


@dataclass(frozen=True)
class Case:
    """One request, and what may come of it."""

    path: str
    body: bytes = b""
    method: str = "POST"
    expect: str = REFUSED
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    def __str__(self) -> str:
        return f"{self.method} {self.path[:300]} {self.body[:1500]!r} ({self.expect})"


@dataclass(frozen=True)
class Answer:
    case: Case
    status: int
    text: str


def asking(path: str, expect: str = REFUSED, **fields: object) -> Case:
    """A greedy request to one of the four APIs. Surrogates leave as JSON escapes."""
    body = {"model": "served", "temperature": 0, **BASES[path], **fields}
    return Case(path, json.dumps(body).encode(), expect=expect)


def text_of(path: str, answer: dict[str, Any]) -> str:
    """What the model said, from whichever API's answer."""
    if path == COMPLETIONS:
        return answer["choices"][0]["text"]
    if path == CHAT:
        return answer["choices"][0]["message"]["content"]
    if path == RESPONSES:
        return answer["output"][-1]["content"][0]["text"]
    return answer["content"][0]["text"]


# What a client could write where memories belong


def bad_ids(memory: str) -> list[Any]:
    """Values that are no ID of a memory in the store, most of them near one that is."""
    return [
        "", " ", "mem_", UNKNOWN, "mem_" + "f" * 32, memory.upper(), memory[:-1], memory + "0",
        memory + "\n", " " + memory, memory + "\0", "\0" + memory, memory[:20] + "\0" + memory[20:],
        memory + ".safetensors", f"./{memory}", f"../store/{memory}", f"../../{memory}",
        "../../../../etc/passwd", "..\\..\\windows", "/etc/passwd", "file:///etc/passwd", "~/x",
        f"%2e%2e%2f{memory}", "*", "mem_*", "${HOME}", "'; DROP TABLE memories; --", "{{7*7}}",
        "мем_" + "0" * 32, "mem_" + "٠" * 32, "mem_" + "０" * 32, "mem_" + "é" * 32,
        "\u202e" + memory,
        "\ud800", memory[:-1] + "\udfff", "\U0001f600" * 50, "x" * 1_000_000, memory * 1000,
        "mem_" + "g" * 32, memory.replace("mem_", "MEM_"), memory[4:], "head_" + memory[4:],
        None, True, False, 0, -1, 1.5, 10**400, float("nan"), float("inf"), [], [memory], {},
        {"id": memory}, {memory: memory}, [[[[memory]]]],
    ]  # fmt: skip


def mutated(memory: str, rng: random.Random) -> str:
    """An ID with some characters replaced, added or gone."""
    characters = list(memory)
    strange = "0fFgG_/\\.%\0\n\t *?:;'\"<>|é０\u200b\u202e\ud800\U0001f600"
    while "".join(characters) == memory:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(characters))
            end = at + rng.randint(0, 2)
            characters[at:end] = rng.choices(strange, k=rng.randint(0, 3))
    return "".join(characters)


def bad_fields(memory: str) -> list[dict[str, Any]]:
    """What names memories in a way that cannot be used, with an ID that could."""
    good, short = [memory], {"memory_ids": [memory]}
    long_forms: list[Any] = [
        [], {}, "", memory, good, 0, 7, True, False, {"ids": []}, {"ids": None}, {"ids": memory},
        {"ids": {memory: 1}}, {"ids": good * 2}, {"ids": [UNKNOWN, *good]},
        {"ids": [*good, UNKNOWN]},
        {"ids": good, "capture": "x"}, {"ids": good, "unknown": 1}, {"ids": good, "": 1},
        {"ids": good, "\ud800": 1}, {"ids": good, "__class__": "x"}, {"ids": good, "Ids": good},
        {"memory_ids": good}, {"ids": good, "tenant": "x"}, {"quality_target": 0.5},
        *({"ids": good, "quality_target": value} for value in (
            0, -0.0, -1, 1.0000001, 2, 1e308, 10**400, float("nan"), float("inf"), float("-inf"),
            "", "high", "0.5", True, False, [], [0.5], {})),
        *({"ids": good, "on_low_quality": value} for value in (
            "", "FAIL", "fail ", "ignore", "\ud800", None, 0, True, [], ["fail"], {})),
        *({"capture": value} for value in (
            "", "a" * 201, "\ud800", 0, 7, True, False, [], ["x"], {}, {"name": "x"})),
        {"ids": [f"mem_{number:032x}" for number in range(10_000)]},
    ]  # fmt: skip
    return [
        *({"memory": value} for value in long_forms),
        *({"memory_ids": value} for value in (
            [], {}, "", memory, 0, 7, True, False, 1.5, {"0": memory}, {memory: True}, good * 2,
            good * 10_000, [*good, UNKNOWN, *good], [f"mem_{n:032x}" for n in range(10_000)],
            [None] * 10_000, [*good, None], [good])),
        {**short, "memory": {"ids": good}},
        {**short, "memory": {"capture": "x"}},
        {**short, "memory": []},
        {"memory_ids": [], "memory": {"ids": good}},
    ]  # fmt: skip


COMPANIONS: list[dict[str, Any]] = [
    {"echo": True}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 0}, {"prompt_logprobs": 5},
    {"use_beam_search": True}, {"use_beam_search": True, "n": 4}, {"truncate_prompt_tokens": 1},
    {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 10**9},
]  # fmt: skip
"""Good in themselves, but with them a memory would be ignored, cut in two or wrong."""

BROKEN: dict[str, list[dict[str, Any]]] = {
    COMPLETIONS: [
        {"n": 0}, {"n": -1}, {"n": "x"}, {"prompt": ""}, {"prompt": None}, {"prompt": []},
        {"prompt": [[]]}, {"prompt": [""]}, {"prompt": [QUESTION, ""]}, {"prompt": {}},
        {"prompt": 7}, {"prompt": "\ud800"}, {"prompt": [10**9]}, {"prompt": [-1]},
        {"prompt": "word " * 4050}, {"prompt": [7] * 5000}, {"prompt_embeds": "AAAA"},
        {"max_tokens": -1}, {"max_tokens": 10**9}, {"temperature": float("nan")},
        {"logprobs": 10**6}, {"stop": [""]}, {"suffix": "x"}, {"model": "other"}, {"model": 7},
        {"cache_salt": ""}, {"cache_salt": 7}, {"cache_salt": "x" * 500}, {"cache_salt": "a@b"},
        {"cache_salt": "\ud800"}, {"cache_salt": "a\0b"}, {"stream": "maybe"},
        {"stream": True, "prompt": ""}, {"kv_transfer_params": 7}, {"kv_transfer_params": []},
        {"kv_transfer_params": {"x": 10**30}},
    ],
    CHAT: [
        {"n": 0}, {"messages": None}, {"messages": []}, {"messages": {}}, {"messages": "hi"},
        {"messages": [7]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "system", "content": "only this"}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "word " * 4050}]},
        {"chat_template": "none of it"}, {"max_tokens": -1}, {"temperature": -1},
        {"kv_transfer_params": "x"},
    ],
    RESPONSES: [
        {"input": None}, {"input": []}, {"input": 7}, {"input": {}}, {"input": [7]},
        {"input": "\ud800"}, {"input": "word " * 5000}, {"input": [{"role": "user"}]},
        {"input": [{"role": "system", "content": "only this"}]},
        {"previous_response_id": "resp_0"}, {"max_output_tokens": -1}, {"prompt": {"id": "x"}},
        {"kv_transfer_params": 7},
    ],
    ANTHROPIC: [
        {"messages": None}, {"messages": []}, {"messages": [7]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "only this"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]}, {"max_tokens": -1},
        {"messages": [{"role": "user", "content": "word " * 4050}]}, {"kv_transfer_params": 7},
    ],
}  # fmt: skip
"""Wrong with a memory that is right."""

UNCAPTURABLE: list[dict[str, Any]] = [
    {"stream": True}, {"n": 2}, {"n": 0}, {"prompt": ""}, {"prompt": [1, 2, 3]}, {"max_tokens": -1},
    {"prompt": [QUESTION, QUESTION]}, {"prompt": "word " * 5000}, {"prompt": "\ud800"},
    {"echo": True}, {"prompt_logprobs": 1}, {"use_beam_search": True},
    {"truncate_prompt_tokens": 4}, {"model": "other"}, {"kv_transfer_params": {"x": 10**30}},
]  # fmt: skip

NOT_JSON = [
    b"", b" ", b"{", b"}", b"null", b"7", b'"x"', b"[]", b"[{}]", b"memory_ids=x", b"\xff\xfe\x00",
    b'{"memory_ids": [}', b"{'memory_ids': []}", b'{"memory_ids": ["\xff"]}', b"\x00" * 1000,
    b"[" * 100_000, b'{"a":' * 100_000, b"{" + b'"memory_ids":[],' * 1000,
]  # fmt: skip


def forgeries(memory: str, loot: Path) -> list[dict[str, Any]]:
    """Fields that tell the connector what only our endpoint may tell it: loads with and without the
    salt that belongs to them, and captures into a file of the client's choice."""
    real = {"memory": memory, "wmatrix": "", "skip": 0, "tokens": 50}
    parts: list[list[dict[str, Any]]] = [
        [real], [{**real, "tokens": 1}], [{**real, "tokens": 10**9}], [{**real, "skip": 90}],
        [real, real], [real] * 500, [{**real, "memory": UNKNOWN}], [{**real, "wmatrix": "0" * 64}],
        [{**real, "memory": "../../etc/passwd"}], [{**real, "memory": "head_" + "0" * 32}],
        [{**real, "memory": ""}], [{**real, "memory": "\0"}], [{**real, "skip": 10**9}],
    ]  # fmt: skip
    besides: list[dict[str, Any]] = [{}, {"tail": 10**9}, {"tenant": "x"}, {"caller_salt": "x"}]
    made_up = [{"parts": one, **besides[number % 4]} for number, one in enumerate(parts)]
    made_up += [{"parts": [real], **more} for more in besides]
    found: list[dict[str, Any]] = []
    for fields in made_up:
        params = LoadParams.model_validate(fields)
        forged = {"kv_transfer_params": {"awareness": params.model_dump(mode="json")}}
        found += [{**forged, "cache_salt": params.cache_salt}, {**forged, "cache_salt": "other"}]
    values = [None, 7, "x", [], {}, {"parts": []}, {"parts": 7}, {"parts": [real], "tail": -1},
              {"parts": [{**real, "tokens": -1}]}, {"parts": [{**real, "x": 1}]}, {"parts": [{}]},
              {"memory": memory, "tokens": 20}]  # fmt: skip
    found += [{"kv_transfer_params": {"awareness": value}} for value in values]
    stolen = str(loot / "stolen.safetensors")
    names = [stolen, "../stolen", "", "\0", 7, None, [], {}, "x" * 100_000]
    found += [{"kv_transfer_params": {"awareness_capture": name}} for name in names]
    ids = ["x", [], [-1], [10**9], ["x"], [None], [[1]], [7] * 5000]
    found += [{"kv_transfer_params": {"prompt_token_ids": value}} for value in ids]
    return found


def routed(memory_id: str, method: str) -> Case:
    """A route of one memory; POST is the one that loads it."""
    # A path that ends in a slash would be redirected to the one without.
    escaped = quote(memory_id[:5000].rstrip("/").encode("utf-8", "surrogatepass"), safe="")
    return Case(f"/v1/memories/{escaped or '%00'}" + "/load" * (method == "POST"), method=method)


def route_cases(ids: list[str]) -> Iterator[Case]:
    """The routes under /v1/memories with IDs and parameters that cannot be."""
    for number, memory_id in enumerate(ids):
        yield routed(memory_id, ("GET", "DELETE", "POST")[number % 3])
    for query in ("limit=0", "limit=-1", "limit=1001", "limit=x", "limit=1e2", "limit=",
                  "limit=" + "9" * 5000, "after=", "after=..%2F..", "after=%00", "after=%FF",
                  "after=" + "m" * 10_000, "limit=1&limit=x"):  # fmt: skip
        yield Case(f"/v1/memories?{query}", method="GET")
    for method in ("PUT", "PATCH", "POST", "DELETE"):
        yield Case("/v1/memories", b'{"ids": ["*"]}', method)


def fixed_cases(memory: str, loot: Path) -> Iterator[Case]:
    """Everything that is worth trying once."""
    usable = {"memory_ids": [memory]}
    for number, memory_id in enumerate(bad_ids(memory)):
        fields = {"memory_ids": [memory_id]} if number % 2 else {"memory": {"ids": [memory_id]}}
        yield asking(PATHS[number // 2 % 4], **fields)
    for number, fields in enumerate(bad_fields(memory)):
        yield asking(PATHS[number % 4], **fields)
    for companion in COMPANIONS:
        yield asking(COMPLETIONS, **usable, **companion)
        yield asking(CHAT, **usable, **companion)
    for path, broken in BROKEN.items():
        for fields in broken:
            yield asking(path, **usable, **fields)
    for fields in UNCAPTURABLE:
        yield asking(COMPLETIONS, memory={"capture": "x"}, **fields)
    for path in PATHS:
        if path != COMPLETIONS:
            yield asking(path, memory={"capture": "x"})
        yield Case(path, json.dumps({**BASES[path], **usable}).encode(), headers={})
        for body in NOT_JSON:
            yield Case(path, body)
    for number, fields in enumerate(forgeries(memory, loot)):
        yield asking(PATHS[number % 4], PLAIN, **fields)
        if number % 3 == 0:
            yield asking(PATHS[number // 3 % 4], MEMORY, **usable, **fields)
    strings = [one for one in bad_ids(memory) if isinstance(one, str)]
    yield from route_cases(strings)


def random_case(memory: str, loot: Path, rng: random.Random) -> Case:
    """A bad ID or a bad field, in whatever company."""
    if rng.random() < 0.15:
        return routed(mutated(memory, rng).rstrip("/") + "x", rng.choice(("GET", "DELETE", "POST")))
    path = rng.choice(PATHS)
    company: dict[str, Any] = {}
    for choices in (COMPANIONS, BROKEN[path], forgeries(memory, loot)):
        if rng.random() < 0.3:
            company |= rng.choice(choices)
    if rng.random() < 0.3:
        return asking(path, **company, **rng.choice(bad_fields(memory)))
    wrong = mutated(memory, rng) if rng.random() < 0.7 else rng.choice(bad_ids(memory))
    ids = [memory] * rng.randint(0, 1) + [wrong]
    rng.shuffle(ids)
    return asking(path, **company, **rng.choice(({"memory_ids": ids}, {"memory": {"ids": ids}})))


def thousand(memory: str, loot: Path) -> list[Case]:
    """The fixed cases and as many random ones as are missing, in a random order."""
    rng = random.Random(20261123)
    cases = list(fixed_cases(memory, loot))
    assert len(cases) < REQUESTS
    cases += [random_case(memory, loot, rng) for _ in range(REQUESTS - len(cases))]
    rng.shuffle(cases)
    return cases


# The server, and what came of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def memory(smollm2: Path, folder: Path) -> str:
    return captured(smollm2, TEXT, folder / "store")


@pytest.fixture(scope="module")
def server(smollm2: Path, memory: str, folder: Path) -> Iterator[Server]:
    """In float32: requests that are answered together are then not rounded differently."""
    yield from serving(smollm2, folder / "store", folder / "server.log", "--dtype", "float32")


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
    params = LoadParams.model_validate({"parts": [{"memory": memory, "tokens": len(ids)}]})
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


CANNOT_BE_CARRIED: list[dict[str, Any]] = [
    {"kv_transfer_params": {"x": "\ud800"}}, {"kv_transfer_params": {"\udfff": 1}},
    {"vllm_xargs": {"\ud800": 1}}, {"vllm_xargs": {"kv_transfer_params": "x"}},
    {"vllm_xargs": {"kv_transfer_params": ["awareness"]}},
]  # fmt: skip
"""What stock vLLM 0.32 accepts, cannot hand to its engine, and answers with 500."""


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


def nested(path: str, where: Callable[[Any], dict[str, Any]], **fields: object) -> Case:
    """A request with lists in lists, which json.dumps could not write."""
    body = asking(path, **fields, **where("@")).body
    deep = b"[" * TOO_DEEP + b"1" + b"]" * TOO_DEEP
    return Case(path, body.replace(b'"@"', deep))


def deep_in_message(deep: Any) -> dict[str, Any]:
    part = {"type": "text", "text": QUESTION, "unknown": deep}
    return {"messages": [{"role": "user", "content": [part]}]}


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
