"""Gemma-3 served with memories of SmolLM2 whose passages it re-reads in place, or has quoted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from awareness_demo.facts import fact_cases
from harness import (
    NEAR_TIE,
    Server,
    assert_same,
    awareness,
    captured,
    parting,
    paused,
    serving,
)
from servers import CHAT_TEMPLATE

from awareness_vllm.align.reread import reread
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import read
from awareness_vllm.passages import BUDGET
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.serving.api.passages import LATE
from awareness_vllm.wmatrix.file import load as load_wmatrix

pytestmark = pytest.mark.engine

TIMEOUT = 8
CASES = fact_cases(9, seed=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reread") / "store"


@pytest.fixture(scope="module")
def server(gemma3: Path, store: Path, wmatrix: Path) -> Iterator[Server]:
    flags = ("--wmatrix", wmatrix, "--quote", 0, "--reread-timeout", TIMEOUT, "--max-num-seqs", 3)
    flags = (*flags, "--enable-prompt-tokens-details", "--trust-request-chat-template")
    yield from serving(gemma3, store, store.parent / "server.log", *flags, "--allow-capture")


@pytest.fixture(scope="module")
def memories(smollm2: Path, store: Path, document: Callable[[int, int], str]) -> list[str]:
    """A memory of each case: the first one of its facts alone, the others' longer than a window,
    within other text."""
    texts = [CASES[0]["context"]]
    for i, case in enumerate(CASES[1:]):
        texts.append(f"{document(350, i)}\n\n{case['context']}\n\n{document(220, 30 + i)}")
    return [captured(smollm2, text, store) for text in texts]


def ask(server: Server, prompt: Any, tokens: int = 8, **body: Any) -> httpx.Response:
    fields = {"model": "served", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json={**fields, **body}, timeout=120)
    return answer.raise_for_status()


def answer_of(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """The answer's text and its log probabilities."""
    (choice,) = response.json()["choices"]
    return choice["text"], choice["logprobs"]


def evict(server: Server, memory: str) -> None:
    httpx.delete(f"{server.url}/v1/memories/{memory}").raise_for_status()


def test_facts_that_the_map_has_lost_are_read_where_the_question_points(
    server: Server, memories: list[str], store: Path
) -> None:
    """More of the facts than the map alone recalls, and nearly all that the target reads itself."""
    right = {"native": 0, "aligned": 0, "reread": 0}
    for case, memory in zip(CASES, memories, strict=True):
        text = read(store / f"{memory}.safetensors").text
        arms = {
            "native": ask(server, text + case["question"]),
            "aligned": ask(server, case["question"], memory={"ids": [memory], "reread": 0}),
            "reread": ask(server, case["question"], memory_ids=[memory]),
        }
        for arm, response in arms.items():
            right[arm] += answer_of(response)[0].startswith(case["answer"])
        assert "reread" not in arms["aligned"].json()["memory"]
        report = arms["reread"].json()["memory"]["reread"]
        assert 8 <= report["tokens"] <= BUDGET
        assert arms["reread"].headers["X-Awareness-Reread"] == str(report["tokens"])
        assert "X-Awareness-Reread" not in arms["aligned"].headers
        ((ranges),) = report["characters"]
        assert "reason" not in report
        assert any(case["answer"].strip() in text[b:e] for b, e in ranges) or len(ranges) > 0
    print(right)
    assert right["reread"] >= right["native"] - 1, right
    assert right["reread"] > right["aligned"], right


def test_what_is_laid_over_is_what_transformers_reads(
    server: Server, memories: list[str], store: Path, wmatrix: Path, gemma3: Path
) -> None:
    """The first token's distribution is that of the offline reference, and no other's."""
    case, memory = CASES[0], memories[0]
    answer = ask(server, case["question"], 1, memory_ids=[memory], logprobs=5)
    served = answer_of(answer)[1]["top_logprobs"][0]
    tokenizer = load_tokenizer(str(gemma3))
    ids = [*tokenize(tokenizer, case["question"]).ids, 0]
    harness = EvalHarness(None, gemma3, load_wmatrix(wmatrix))
    package = read(store / f"{memory}.safetensors")
    spans = tokenize(tokenizer, package.text).spans
    index = PassageIndex.of(package.text, spans, harness.sink())
    chosen = index.choose(case["question"])
    report = answer.json()["memory"]
    assert report["reread"]["characters"] == [[list(index.characters(span)) for span in chosen]]
    aligned, tail = harness.memory(package), report["native_tail"]
    expected = {
        "reread": harness.logprobs(reread(harness.target_model, aligned, chosen), ids, 1, tail),
        "aligned": harness.logprobs(aligned, ids, 1, tail),
        "native": harness.logprobs(harness.native(harness.ids(package.text)), ids, 1),
    }
    vocabulary = {tokenizer.decode([i]): i for i in range(tokenizer.get_vocab_size())}
    distance = {
        arm: max(abs(served[t] - logprobs[0, vocabulary[t]].item()) for t in served)
        for arm, logprobs in expected.items()
    }
    print(distance)
    assert distance["reread"] <= 0.5 * min(distance["aligned"], distance["native"]), distance


def test_an_answer_does_not_depend_on_what_others_asked(
    server: Server, memories: list[str]
) -> None:
    case, memory = CASES[3], memories[3]
    evict(server, memory)
    fresh = ask(server, case["question"], memory_ids=[memory])
    first = server.logprobs(case["question"], 8, memory_ids=[memory], cache_salt="first")
    evict(server, memory)
    with ThreadPoolExecutor(4) as pool:
        questions = ["Who lives where?", "What is the code?", case["question"][:25]] * 2
        others = [
            pool.submit(ask, server, f"\n\n{question} It is", 4, memory_ids=[memory])
            for question in questions
        ]
        [other.result() for other in others]
    later = ask(server, case["question"], memory_ids=[memory], cache_salt="second")
    assert later.json()["memory"]["reread"] == fresh.json()["memory"]["reread"]
    second = server.logprobs(case["question"], 8, memory_ids=[memory], cache_salt="second")
    assert first.top_logprobs
    assert second.top_logprobs
    # Passages that are read in other batches may be rounded otherwise.
    one, other = first.top_logprobs[0], second.top_logprobs[0]
    gaps = {token: abs(one[token] - other[token]) for token in one.keys() & other.keys()}
    print("gaps", gaps, "parting", parting(first, second))
    assert len(gaps) >= 3
    assert max(gaps.values()) <= 2 * NEAR_TIE


def test_without_re_reading_all_is_as_it_was(server: Server, memories: list[str]) -> None:
    """Blocks of a request that re-reads are never found by one that does not."""
    case, memory = CASES[2], memories[2]
    off = {"memory": {"ids": [memory], "reread": 0}}
    before = ask(server, case["question"], logprobs=5, **off)
    ask(server, case["question"], memory_ids=[memory])
    after = ask(server, case["question"], logprobs=5, **off)
    assert answer_of(before) == answer_of(after)
    evict(server, memory)
    assert (
        answer_of(ask(server, case["question"], **off, cache_salt="x"))[0] == (answer_of(before)[0])
    )


def test_chats_and_several_memories_re_read_each_in_its_place(
    server: Server, memories: list[str]
) -> None:
    case = CASES[1]
    words = f"Complete this sentence:{case['question'].splitlines()[-1]}"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": words}]
    fields = {"model": "served", "messages": messages, "max_tokens": 8, "temperature": 0}
    body = {**fields, "chat_template": CHAT_TEMPLATE, "memory_ids": [memories[0], memories[1]]}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert chat["memory"]["plan"] == "load", chat["memory"]
    assert chat["memory"]["temperature"] != "recomputed", chat["memory"]
    assert len(chat["memory"]["reread"]["characters"]) == 2
    both = {"memory_ids": [memories[0], memories[1]]}
    plain = ask(server, case["question"], **both).json()
    alone = ask(server, case["question"], memory_ids=[memories[1]]).json()
    # The same passages of the same memory, wherever it stands.
    for response in (chat, plain):
        assert (
            response["memory"]["reread"]["characters"][1]
            == (alone["memory"]["reread"]["characters"][0])
        )
    print(chat["choices"][0]["message"]["content"], plain["choices"][0]["text"])
    assert plain["choices"][0]["text"].startswith(case["answer"])


def test_streams_several_answers_and_several_prompts(server: Server, memories: list[str]) -> None:
    case, memory = CASES[4], memories[4]
    whole = answer_of(ask(server, case["question"], memory_ids=[memory]))[0]
    stream = server.client.completions.create(
        model="served", prompt=case["question"], max_tokens=8, temperature=0, stream=True,
        extra_body={"memory_ids": [memory]},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == whole
    two = ask(server, case["question"], memory_ids=[memory], n=2, temperature=0.01).json()
    assert len(two["choices"]) == 2
    assert two["memory"]["reread"]["tokens"] >= 8
    prompts = [case["question"], CASES[5]["question"]]
    many = ask(server, prompts, memory_ids=[memory]).json()
    assert [len(many["choices"]), 8 <= many["memory"]["reread"]["tokens"] <= BUDGET] == [2, True]


def test_a_late_passage_stays_aligned_and_nobody_elses_answer_changes(
    server: Server, memories: list[str]
) -> None:
    case, memory, other = CASES[6], memories[6], CASES[7]
    off = {"memory": {"ids": [memory], "reread": 0}}
    aligned = ask(server, case["question"], logprobs=5, **off)
    theirs = ask(server, other["question"], memory_ids=[memories[7]], logprobs=5)
    evict(server, memory)  # the first test has asked this, and its passages would be there
    with ThreadPoolExecutor(2) as pool:
        with paused(server):
            late = pool.submit(ask, server, case["question"], memory_ids=[memory], logprobs=5)
            beside = pool.submit(
                ask, server, other["question"], memory_ids=[memories[7]], logprobs=5
            )
            time.sleep(TIMEOUT + 4)
        response = late.result()
        assert_same(theirs, beside.result())
    report = response.json()["memory"]["reread"]
    assert report == {"tokens": 0, "characters": [[]], "reason": LATE}
    assert response.headers["X-Awareness-Reread"] == "0"
    assert_same(aligned, response)
    # It went on being read, and is there for the next question.
    later = ask(server, case["question"], memory_ids=[memory]).json()["memory"]
    assert later["reread"]["tokens"] >= 8, later


def test_a_question_that_is_given_up_leaves_nothing_behind(
    server: Server, memories: list[str]
) -> None:
    case, memory = CASES[8], memories[8]
    with paused(server), pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "served", "prompt": case["question"], "memory_ids": [memory]},
            timeout=1,
        )
    time.sleep(1)
    report = ask(server, case["question"], memory_ids=[memory]).json()["memory"]
    assert report["reread"]["tokens"] >= 8, report
    metrics = httpx.get(f"{server.url}/metrics").text
    running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_")]
    assert running
    assert all(line.endswith(" 0.0") for line in running), running


def test_a_memory_of_the_model_itself_is_not_re_read(
    server: Server, document: Callable[[int, int], str]
) -> None:
    text = document(300, 9)
    made = ask(server, text, 1, memory={"capture": "own"}).json()["memory"]
    question = "\n\nWhat is Debian? It is"
    answer = ask(server, question, 16, memory_ids=[made["id"]])
    assert answer.json()["memory"]["reread"] == {"tokens": 0, "characters": [[]]}
    native = server.logprobs(text + question)
    assert parting(native, server.logprobs(question, memory_ids=[made["id"]])) <= NEAR_TIE


def test_quotes_stand_between_the_memory_and_the_question(
    server: Server, memories: list[str], store: Path, gemma3: Path
) -> None:
    case, memory = CASES[5], memories[5]
    text = read(store / f"{memory}.safetensors").text
    body: dict[str, Any] = {"return_token_ids": True, "memory": {"ids": [memory]}}
    plain = ask(server, case["question"], **body).json()
    body["memory"]["quote"] = BUDGET
    quoted = ask(server, case["question"], **body)
    answer, report = quoted.json(), quoted.json()["memory"]
    assert ("reread" in plain["memory"], "reread" in report) == (True, False)
    ((ranges),) = report["quoted"]["characters"]
    passages = " ".join(text[begin:end].strip() for begin, end in ranges)
    before, after = (a["choices"][0]["prompt_token_ids"] for a in (plain, answer))
    extra = len(after) - len(before)
    asked = len(tokenize(load_tokenizer(str(gemma3)), case["question"]).ids)
    begin = len(before) - asked
    assert (after[:begin], after[begin + extra :]) == (before[:begin], before[begin:])
    decode = load_tokenizer(str(gemma3)).decode
    assert decode(after[begin : begin + extra]) == f"\n\nContext: {passages}\n"
    assert extra == report["quoted"]["tokens"] == int(quoted.headers["X-Awareness-Quoted"])
    assert answer["choices"][0]["text"].startswith(case["answer"])


def test_a_chat_has_its_quotes_in_the_users_turn(server: Server, memories: list[str]) -> None:
    messages = [{"role": "user", "content": f"{CASES[1]['question'].split('?')[0]}?"}]
    body = {"model": "served", "messages": messages, "max_tokens": 1, "return_token_ids": True}
    body |= {"chat_template": CHAT_TEMPLATE, "memory": {"ids": memories[:2], "quote": BUDGET}}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert chat["memory"]["quoted"]["characters"][1]
    ids = {"model": "served", "tokens": chat["prompt_token_ids"]}
    prompt = httpx.post(f"{server.url}/detokenize", json=ids).json()["prompt"]
    context, _, rest = prompt.rpartition("\n\nContext: ")[2].partition("\n")
    assert context
    assert rest.strip().startswith(messages[0]["content"].strip()), rest


@pytest.mark.parametrize("field", ["reread", "quote"])
@pytest.mark.parametrize("value", [-1, 257, "some", 3.5, True])
def test_bad_values_are_refused(
    server: Server, memories: list[str], field: str, value: object
) -> None:
    body = {"ids": [memories[0]], field: value}
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        ask(server, "\n\nWho?", memory=body)


def test_a_latent_package_answers_as_its_package(
    server: Server, memories: list[str], store: Path, wmatrix: Path, gemma3: Path
) -> None:
    """By the map alone, with passages re-read in place or quoted, and after another memory in a
    chat; whether the server has aligned it before or not."""
    memory, question = memories[1], CASES[1]["question"]
    export = awareness("export", memory, "--store", store, "--target", gemma3, "--latent", wmatrix)
    assert export.status == 0, export.stderr[-3000:]
    latent = export.out["id"]
    assert export.out["bytes"] < 0.06 * export.out["bytes_before"]
    for settings in ({"reread": 0}, {"reread": 48}, {"quote": 48}):
        plain, other = (
            ask(server, question, logprobs=5, memory={"ids": [id], **settings}, cache_salt="new")
            for id in (memory, latent)
        )
        # Passages that are read in other batches may be rounded otherwise.
        assert_same(plain, other, 2 * NEAR_TIE if settings.get("reread") else 0.0)
        told = [
            {
                k: v
                for k, v in answer.json()["memory"].items()
                if k in ("origin", "retention", "tokens", "plan", "reread", "quoted")
            }
            for answer in (plain, other)
        ]
        assert told[0] == told[1]
        assert told[0]["plan"] == "load"
    messages = [{"role": "user", "content": question}]
    fields = {"model": "served", "messages": messages, "max_tokens": 8, "temperature": 0}
    fields |= {"logprobs": True, "top_logprobs": 5}
    said = [
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**fields, "chat_template": CHAT_TEMPLATE, "memory_ids": [memories[0], id]},
            timeout=120,
        ).raise_for_status()
        for id in (memory, latent)
    ]
    assert [answer.json()["memory"]["plan"] for answer in said] == ["load", "load"]
    assert_same(*said, 2 * NEAR_TIE)
