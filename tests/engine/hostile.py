"""A thousand hostile requests: what a client could write where memories belong, and around it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from awareness_vllm.serving.params import LoadParams

REQUESTS = 1000
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
        {"memory_id": memory}, {"memories": good}, {"memoryIds": good}, {"memory_ids[]": memory},
        {"extra_body": short}, {"extra_body": {"memory": {"ids": good}}}, {"metadata": short},
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
    real = {"memory": memory, "digest": "0" * 64, "wmatrix": "", "skip": 0, "tokens": 50}
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


CANNOT_BE_CARRIED: list[dict[str, Any]] = [
    {"kv_transfer_params": {"x": "\ud800"}}, {"kv_transfer_params": {"\udfff": 1}},
    {"vllm_xargs": {"\ud800": 1}}, {"vllm_xargs": {"kv_transfer_params": "x"}},
    {"vllm_xargs": {"kv_transfer_params": ["awareness"]}},
]  # fmt: skip
"""What stock vLLM 0.32 accepts, cannot hand to its engine, and answers with 500."""


def nested(path: str, where: Callable[[Any], dict[str, Any]], **fields: object) -> Case:
    """A request with lists in lists, which json.dumps could not write."""
    body = asking(path, **fields, **where("@")).body
    deep = b"[" * TOO_DEEP + b"1" + b"]" * TOO_DEEP
    return Case(path, body.replace(b'"@"', deep))


def deep_in_message(deep: Any) -> dict[str, Any]:
    part = {"type": "text", "text": QUESTION, "unknown": deep}
    return {"messages": [{"role": "user", "content": [part]}]}
