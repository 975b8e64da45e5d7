"""SmolLM2 served with memories of itself; chat, and memories that lead elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from harness import NEAR_TIE, Server, awareness, captured, serving

from awareness_vllm.wmatrix.file import load, read_manifest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2") / "store"


@pytest.fixture(scope="module")
def server(smollm2: Path, gemma3: Path, store: Path, wmatrix: Path) -> Iterator[Server]:
    """Given a W-Matrix from Gemma-3 that leads to Gemma-3, not to the served model."""
    elsewhere = store.parent / "elsewhere.wmatrix"
    learned = load(wmatrix)
    target = learned.manifest.target
    replace(learned, manifest=learned.manifest.model_copy(update={"source": target})).save(
        elsewhere
    )
    yield from serving(smollm2, store, store.parent / "server.log", "--wmatrix", elsewhere)


@pytest.fixture(scope="module")
def own(smollm2: Path, store: Path, document: Callable[[int, int], str]) -> tuple[str, str]:
    text = document(400, 1)
    return captured(smollm2, text, store, "--engine", "vllm"), text


def test_same_model_greedy_is_native(server: Server, own: tuple[str, str]) -> None:
    memory, text = own
    gaps = [
        server.differs_from_native(text, question, memory)
        for question in ("\n\nIn short, the text says that the", " The")
    ]
    assert 0.0 in gaps
    assert max(gaps) <= NEAR_TIE, gaps


def test_chat_reads_the_memory(server: Server, own: tuple[str, str]) -> None:
    """The answer changes with the memory, streams the same, and costs no prefill of the memory."""
    messages = [{"role": "user", "content": "Which project is the text about? Answer in a word."}]

    def chat(**more: object) -> openai.types.chat.ChatCompletion:
        return server.client.chat.completions.create(
            model="served", messages=messages, max_tokens=24, temperature=0, **more
        )

    plain, memory = chat(), chat(extra_body={"memory_ids": [own[0]]})
    assert memory.usage.prompt_tokens > plain.usage.prompt_tokens + 300
    assert memory.choices[0].message.content != plain.choices[0].message.content
    stream = chat(extra_body={"memory_ids": [own[0]]}, stream=True)
    streamed = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert streamed == memory.choices[0].message.content
    assert chat().choices[0].message.content == plain.choices[0].message.content


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
    assert "elsewhere.wmatrix leads to gemma3-270m" in message
    assert "gemma3-270m → smollm2-135m" in message
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
