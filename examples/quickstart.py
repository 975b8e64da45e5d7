"""The main job, end to end: SmolLM2 reads a document, Gemma-3 answers from the memory of it.

Prepares both models, fits (or loads) and certifies the W-Matrix, and starts vLLM's server on
Gemma-3 with the plugin. Then it asks questions about facts with the text in the prompt, and those
that Gemma-3 answers rightly from SmolLM2's memories of these texts; it prints how many, some of the
answers, and the time to first token.
"""

from __future__ import annotations

import json
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

import openai
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.facts import Case, fact_cases
from awareness_demo.models import prepare
from awareness_demo.servers import AWARENESS, NAME, running
from awareness_demo.wmatrices import is_readable

from awareness_vllm.anchors.corpus import load
from awareness_vllm.cli.format import lines
from awareness_vllm.files import anchors_dir, default_store, home, models_dir, wmatrices_dir
from awareness_vllm.models.hf import load_model
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.wmatrix.manifest import read_manifest

SERVER = ("--enforce-eager", "--kv-cache-memory-bytes", "1G", "--max-model-len", "4096")
MEMORY_TOKENS = 2000
DOCUMENTS = 3
CASES = 24
SHOWN = 4
SEED = 2


def main() -> None:
    started = time.perf_counter()
    models = prepare()
    install()
    source, target = models["smollm2-135m"], models["gemma3-270m"]
    wmatrix = fitted(source, target)
    certify(wmatrix, source, target)
    memories = Memories(source)
    log = home() / "demo" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"\nstarting vLLM on {target.name} (log: {log})", flush=True)
    with running(AWARENESS, target, [*SERVER, "--wmatrix", wmatrix], log) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        facts(client, memories)
        time_to_first_token(client, memories)
    print(
        f"\ntook {time.perf_counter() - started:.0f} s "
        f"on {os.cpu_count()} cores ({platform.machine()})"
    )


def run(*args: str | Path) -> dict[str, Any]:
    """One `awareness` subcommand, its progress on our stderr, its JSON result returned."""
    command = [sys.executable, "-m", "awareness_vllm.cli.main", *map(str, args), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def fitted(source: Path, target: Path) -> Path:
    """The W-Matrix from source to target, fitted unless it is there."""
    path = wmatrices_dir() / f"{source.name}--{target.name}.wmatrix"
    if not is_readable(path):
        print(f"fitting {path.name}")
        models = ("--source", source, "--target", target)
        print(run("fit", *models, "--anchors", anchors_dir(), "--out", path))
    return path


def certify(wmatrix: Path, source: Path, target: Path) -> None:
    """The five arms on sources that no anchor came from; measured once per W-Matrix, kept in it."""
    if read_manifest(wmatrix).certificate is None:
        models = ("--source", source, "--target", target)
        texts = [held_out_dir() / name for name in ("crawl", "debian-history", "wordnet")]
        cases = held_out_dir() / "facts/cases.jsonl"
        run("certify", wmatrix, *models, "--texts", *texts, "--cases", cases, "--limit", "12")
    certificate = read_manifest(wmatrix).certificate
    print(f"\nfive arms{'':5}{'NLL':>8}{'KL':>8}{'top-1':>8}{'facts':>8}")
    for arm, row in certificate["texts"].items():
        exact = certificate["cases"][arm]["exact_match"]
        print(f"{arm:14}{row['nll']:8.3f}{row['kl']:8.3f}{row['top1']:8.3f}{exact:8.2f}")
    print("\n".join(lines(certificate)))


class Memories:
    """Memories of the source model, captured as `awareness capture` does."""

    def __init__(self, source: Path) -> None:
        self.source, self.model = source, load_model(source)

    def of(self, text: str, name: str) -> str:
        """The ID of a text's memory."""
        package = capture(self.source, text, name=name, model=self.model)
        return publish(package, default_store()).stem


@dataclass(frozen=True)
class Answer:
    """What the target says to a case's question, and whether that is right."""

    case: Case
    text: str

    @property
    def right(self) -> bool:
        return self.text.startswith(self.case["answer"].strip())


def facts(client: openai.OpenAI, memories: Memories) -> None:
    """Questions with the text in the prompt; those answered rightly again, from memories."""
    asked = [ask(client, case, case["context"]) for case in fact_cases(CASES, SEED)]
    native = [answer for answer in asked if answer.right]
    loaded = [
        ask(client, answer.case, memory=memories.of(answer.case["context"], f"facts-{i}"))
        for i, answer in enumerate(native)
    ]
    kept = sum(answer.right for answer in loaded)
    print(f"\n{CASES} questions about facts, each after a text of about 250 tokens")
    print(f"  right with the text in the prompt   {share(len(native), CASES)}")
    print(f"  of these, right with the memory     {share(kept, len(native))}")
    pairs = list(zip(native, loaded, strict=True))
    shown = random.Random(SEED).sample(pairs, min(SHOWN, len(pairs)))
    print(f"{len(shown)} of those {len(native)}, drawn by a fixed seed:")
    for answer, with_memory in shown:
        show(answer, with_memory, ask(client, answer.case))


def share(count: int, total: int) -> str:
    return f"{count} of {total}" + (f" ({count / total:.0%})" if total else "")


def show(native: Answer, loaded: Answer, without: Answer) -> None:
    """One question's three answers."""
    question, _, begun = native.case["question"].strip().partition("\n")
    print(f"\n{question}\n{begun} …   right: {native.case['answer'].strip()}")
    for name, answer in (
        ("without memory", without),
        ("with the memory", loaded),
        ("text in the prompt", native),
    ):
        print(f"  {name:20}{answer.text!r}{'' if answer.right else '   (wrong)'}")


def ask(client: openai.OpenAI, case: Case, text: str = "", memory: str | None = None) -> Answer:
    """A case's question, after a text or a memory."""
    answer = client.completions.create(
        model=NAME,
        prompt=text + case["question"],
        max_tokens=12,
        temperature=0,
        stop="\n",
        extra_body={"memory_ids": [memory]} if memory else None,
    )
    return Answer(case, answer.choices[0].text.strip())


def documents() -> Sequence[str]:
    """Stretches of a real document, `MEMORY_TOKENS` target tokens long."""
    text = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    spans = tokenize(load_tokenizer(str(models_dir() / "gemma3-270m")), text).spans
    cuts = [spans[MEMORY_TOKENS * i, 0] for i in range(DOCUMENTS + 1)]
    return [text.encode()[cuts[i] : cuts[i + 1]].decode(errors="ignore") for i in range(DOCUMENTS)]


def time_to_first_token(client: openai.OpenAI, memories: Memories) -> None:
    """Each document once natively, then its memory cold, warm (another salt) and hot."""
    seconds: dict[str, list[float]] = {"native": [], "cold": [], "warm": [], "hot": []}
    prompt = "\n\nIn short, the text says that"
    texts = {memories.of(text, f"document-{i}"): text for i, text in enumerate(documents())}
    first_token(client, prompt, {})  # the server's own warm-up, in nobody's time
    for memory, text in texts.items():
        seconds["native"].append(first_token(client, text + prompt, {}))
        for temperature, salt in (("cold", "a"), ("warm", "b"), ("hot", "b")):
            body = {"memory_ids": [memory], "cache_salt": salt}
            seconds[temperature].append(first_token(client, prompt, body))
    native = statistics.median(seconds["native"])
    print(f"\ntime to first token, {MEMORY_TOKENS} tokens, median of {len(texts)} documents")
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
