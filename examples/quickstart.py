"""The main job, end to end: SmolLM2 reads texts, Gemma-3 answers from the memories of them.

Prepares both models and the shipped W-Matrix between them, and starts vLLM's server on Gemma-3 with
the plugin, while SmolLM2 reads three texts of some 1,700 tokens. Then it prints the time to first
token, natively and from the memories; how many questions about facts Gemma-3 answers with the text
in the prompt, and how many of these from the memory; some of the answers; and what became of the
memories in the server's idle time.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from awareness_demo.anchors import install
from awareness_demo.facts import Case, fact_cases
from awareness_demo.models import prepare
from awareness_demo.servers import AWARENESS, NAME, Running, running
from awareness_demo.wmatrices import name_of, provide

from awareness_vllm.cli.format import lines
from awareness_vllm.files import anchors_dir, default_store, home, wmatrices_dir
from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.wmatrix.manifest import read_manifest

SERVER = ("--enforce-eager", "--kv-cache-memory-bytes", "1G", "--max-model-len", "4096")
TEXTS, CASES_EACH = 3, 8
"""Texts, and the cases whose contexts make one up: 24 people's cities, jobs and codes."""
SHOWN = 3
SEED = 2
EDITION_S = 60.0
"""Seconds to wait for an edition."""


def main() -> None:
    started = time.perf_counter()
    models = prepare(progress=lambda line: None)
    source, target = models["smollm2-135m"], models["gemma3-270m"]
    wmatrix = provide(source, target) or fitted(source, target)
    show_certificate(wmatrix)
    texts = [Text.make(number) for number in range(TEXTS)]

    def read() -> None:
        print(f"{source.name} reads {TEXTS} texts", flush=True)
        model = load_model(source)
        for text in texts:
            package = capture(source, text.text, name=f"text {text.number}", model=model)
            text.memory = publish(package, default_store()).stem

    log = home() / "demo" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"\nstarting vLLM on {target.name} (log: {log})", flush=True)
    flags = [*SERVER, "--wmatrix", wmatrix]
    with running(AWARENESS, target, flags, log, meanwhile=read) as server:
        ready = time.perf_counter()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        time_to_first_token(client, texts)
        facts(client, texts)
        editions(server, client, texts)
    print(
        f"\ntook {time.perf_counter() - started:.0f} s, {ready - started:.0f} s of them until the "
        f"server answered, on {os.cpu_count()} cores ({platform.machine()})"
    )
    print(
        f'\nAsk yourself, without a server:\n  awareness ask {texts[0].memory} \\\n    "'
        f'{question_of(texts[0].cases[0])}" --target {target}'
    )


def fitted(source: Path, target: Path) -> Path:
    """The W-Matrix from source to target by a fit of some ten minutes, where the shipped one is for
    other weights: other versions of transformers write other files."""
    install()
    path = wmatrices_dir() / name_of(source, target)
    print(f"no shipped map for these models: fitting {path.name}")
    command = [sys.executable, "-m", "awareness_vllm.cli.main", "fit", "--source", source]
    command += ["--target", target, "--anchors", anchors_dir(), "--out", path]
    subprocess.run(list(map(str, command)), check=True)
    return path


def show_certificate(wmatrix: Path) -> None:
    """The five arms of a map's certificate, measured on sources that no anchor came from."""
    certificate = read_manifest(wmatrix).certificate
    print(f"{wmatrix.name}" + ("" if certificate else ": not certified"))
    if certificate is None:
        return
    print(f"five arms{'':5}{'NLL':>8}{'KL':>8}{'top-1':>8}{'facts':>8}")
    for arm, row in certificate["texts"].items():
        exact = certificate["cases"].get(arm, {}).get("exact_match", float("nan"))
        print(f"{arm:14}{row['nll']:8.3f}{row['kl']:8.3f}{row['top1']:8.3f}{exact:8.2f}")
    print("\n".join(lines(certificate)))


@dataclass
class Text:
    """A text of some 1,700 tokens about 24 people, the cases in it, and its memory's ID."""

    number: int
    text: str
    cases: Sequence[Case]
    memory: str = ""

    @classmethod
    def make(cls, number: int) -> Text:
        cases = fact_cases(CASES_EACH, SEED + number)
        return cls(number, "\n\n".join(case["context"] for case in cases), cases)


@dataclass(frozen=True)
class Answer:
    """What the target says to a case's question, whether that is right; the passages that it read
    again, as character ranges of the text, and whether the memory was an edition."""

    case: Case
    text: str
    passages: Sequence[Sequence[int]] = ()
    exact: bool = False

    @property
    def right(self) -> bool:
        return self.text.startswith(self.case["answer"].strip())


def facts(client: openai.OpenAI, texts: Sequence[Text]) -> None:
    """Questions from the memory, and with the text in the prompt."""
    asked = [(text, case) for text in texts for case in text.cases]
    loaded = [ask(client, case, body=ids_of(text)) for text, case in asked]
    native = [ask(client, case, text.text) for text, case in asked]
    known = [i for i, answer in enumerate(native) if answer.right]
    print(f"\n{len(asked)} questions about facts, each about a text of some 1,700 tokens")
    print(f"  right with the text in the prompt   {share(len(known), len(asked))}")
    print(f"  of these, right with the memory     {share(rights(loaded, known), len(known))}")
    print(f"  of all, right with the memory       {share(rights(loaded), len(asked))}")
    if exact := sum(answer.exact for answer in loaded):
        print(f"  {exact} answers came from states that the server had made in idle time already")
    for i in random.Random(SEED).sample(known, min(SHOWN, len(known))):
        show(asked[i][0], native[i], loaded[i], ask(client, asked[i][1]))


def rights(answers: Sequence[Answer], which: Sequence[int] | None = None) -> int:
    return sum(answers[i].right for i in (range(len(answers)) if which is None else which))


def share(count: int, total: int) -> str:
    return f"{count} of {total}" + (f" ({count / total:.0%})" if total else "")


def show(text: Text, native: Answer, loaded: Answer, without: Answer) -> None:
    """One question's three answers, and what of the memory's text was read again."""
    question, _, begun = native.case["question"].strip().partition("\n")
    print(f"\n{question}\n{begun} …   right: {native.case['answer'].strip()}")
    for name, answer in (
        ("without memory", without),
        ("with the memory", loaded),
        ("text in the prompt", native),
    ):
        print(f"  {name:20}{answer.text!r}{'' if answer.right else '   (wrong)'}")
        for begin, end in answer.passages:
            print(f"  {'':20}it read itself: {text.text[begin:end].strip()!r}")


def editions(server: Running, client: openai.OpenAI, texts: Sequence[Text]) -> None:
    """What the server makes of memories in its idle time: its own states of their texts."""
    started = time.perf_counter()
    while not all(has_edition(server, text) for text in texts):
        if time.perf_counter() - started > EDITION_S:
            print(f"\nno editions within {EDITION_S:.0f} s")
            return
        time.sleep(0.5)
    waited = time.perf_counter() - started
    pairs = [
        (ask(client, case, text.text), ask(client, case, body=ids_of(text)))
        for text in texts
        for case in text.cases
    ]
    same = sum(native.text == exact.text for native, exact in pairs)
    print(f"\nafter {waited:.0f} s of idle time the server has read the texts itself (editions)")
    print(f"  answers as with the text in the prompt   {share(same, len(pairs))}")
    salted = [
        first_token(client, text.cases[0]["question"], {**ids_of(text), "cache_salt": "c"})
        for text in texts
    ]
    print(f"  time to first token, warm                {1000 * statistics.median(salted):.0f} ms")


def has_edition(server: Running, text: Text) -> bool:
    return bool(httpx.get(f"{server.url}/v1/memories/{text.memory}").json().get("edition"))


def question_of(case: Case) -> str:
    return case["question"].strip().partition("\n")[0].removeprefix("Question: ")


def ids_of(text: Text) -> dict[str, Any]:
    return {"memory_ids": [text.memory]}


def ask(
    client: openai.OpenAI, case: Case, text: str = "", body: dict[str, Any] | None = None
) -> Answer:
    """A case's question, after a text or memories."""
    answer = client.completions.create(
        model=NAME,
        prompt=text + case["question"],
        max_tokens=12,
        temperature=0,
        stop="\n",
        extra_body=body,
    )
    report = (answer.model_extra or {}).get("memory") or {}
    ranges = (report.get("quoted") or report.get("reread") or {}).get("characters") or [[]]
    exact = any(report.get("edition") or ())
    return Answer(case, answer.choices[0].text.strip(), ranges[0], exact)


def time_to_first_token(client: openai.OpenAI, texts: Sequence[Text]) -> None:
    """A question natively, then from the memory: cold, warm (another salt), hot."""
    seconds: dict[str, list[float]] = {"native": [], "cold": [], "warm": [], "hot": []}
    first_token(
        client, "In short, the text says that", {}
    )  # the server's warm-up, in nobody's time
    for text in texts:
        question = text.cases[0]["question"]
        seconds["native"].append(first_token(client, text.text + question, {}))
        for temperature, salt in (("cold", "a"), ("warm", "b"), ("hot", "b")):
            body = {**ids_of(text), "cache_salt": salt}
            seconds[temperature].append(first_token(client, question, body))
    native = statistics.median(seconds["native"])
    print(f"\ntime to first token, some 1,700 tokens, median of {len(texts)} texts")
    for temperature, values in seconds.items():
        median = statistics.median(values)
        print(f"  {temperature:8}{1000 * median:8.0f} ms{native / median:8.1f} ×")


def first_token(client: openai.OpenAI, prompt: str, body: dict[str, Any]) -> float:
    """Seconds from sending a streamed request to its first token."""
    started = time.perf_counter()
    stream = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=2, temperature=0, stream=True, extra_body=body
    )
    next(iter(stream))
    elapsed = time.perf_counter() - started
    for _ in stream:
        continue
    return elapsed


if __name__ == "__main__":
    main()
