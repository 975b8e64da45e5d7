"""The main job, end to end: SmolLM2 reads a document, Gemma-3 answers from the memory of it.

Prepares both models, captures a real document, fits (or loads) the W-Matrix, starts vLLM's server
on Gemma-3 with the plugin, asks without the memory, with it, and with the text in the prompt, and
prints the three answers, the five arms with retention and fact recall, and time to first token.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.facts import fact_cases
from awareness_demo.models import prepare

from awareness_vllm.anchors.corpus import load
from awareness_vllm.cli.format import lines
from awareness_vllm.files import anchors_dir, default_store, home, models_dir, wmatrices_dir
from awareness_vllm.models.hf import load_model
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.wmatrix.manifest import is_readable, read_manifest

MEMORY_TOKENS = 2000
ROUNDS = 3
CASES = 4


def main() -> None:
    started = time.perf_counter()
    models = prepare()
    install()
    source, target = models["smollm2-135m"], models["gemma3-270m"]
    wmatrix = fitted(source, target)
    certify(wmatrix, source, target)
    cases = fact_cases(CASES, seed=2)
    texts = {f"facts-{i}": case["context"] for i, case in enumerate(cases)}
    texts |= {f"document-{i}": long_text(i) for i in range(ROUNDS)}
    memories = captured(source, texts)
    with server(target, wmatrix) as client:
        for i, case in enumerate(cases):
            ask(client, memories.pop(f"facts-{i}"), case)
        time_to_first_token(client, memories)
    print(
        f"\ntook {time.perf_counter() - started:.0f} s "
        f"on {os.cpu_count()} cores ({platform.machine()})"
    )


def run(*args: str | Path) -> dict:
    """One `awareness` subcommand, its progress on our stderr, its JSON result returned."""
    command = [sys.executable, "-m", "awareness_vllm.cli.main", *map(str, args), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def fitted(source: Path, target: Path) -> Path:
    path = wmatrices_dir() / f"{source.name}--{target.name}.wmatrix"
    if not is_readable(path):
        print(f"fitting {path.name}")
        print(
            run(
                "fit",
                "--source",
                source,
                "--target",
                target,
                "--anchors",
                anchors_dir(),
                "--out",
                path,
            )
        )
    return path


def captured(source: Path, texts: dict[str, str]) -> dict[str, str]:
    """Capture texts on the source model, as `awareness capture` does; the memories' IDs."""
    model = load_model(source)
    memories = {}
    for name, text in texts.items():
        package = capture(source, text, name=name, model=model)
        memories[name] = publish(package, default_store()).stem
        print(f"captured {name}: {package.manifest.tokens} tokens → {memories[name]}", flush=True)
    return memories


def long_text(number: int) -> str:
    """A stretch of a real document, `MEMORY_TOKENS` target tokens long."""
    texts = [d.text for d in load([held_out_dir() / "debian-history"])]
    tokens = tokenize(load_tokenizer(models_dir() / "gemma3-270m"), "\n\n".join(texts))
    begin, end = (tokens.spans[MEMORY_TOKENS * (number + i), 0] for i in (0, 1))
    return "\n\n".join(texts).encode()[begin:end].decode(errors="ignore")


def certify(wmatrix: Path, source: Path, target: Path) -> None:
    """The five arms on sources that no anchor came from; measured once per W-Matrix, kept in it."""
    if read_manifest(wmatrix).certificate is None:
        models = ("--source", source, "--target", target)
        texts = [held_out_dir() / name for name in ("crawl", "debian-history", "wordnet")]
        cases = held_out_dir() / "facts/cases.jsonl"
        run("certify", wmatrix, *models, "--texts", *texts, "--cases", cases, "--limit", 12)
    certificate = read_manifest(wmatrix).certificate
    print(f"\nfive arms{'':5}{'NLL':>8}{'KL':>8}{'top-1':>8}{'facts':>8}")
    for arm, row in certificate["texts"].items():
        facts = certificate["cases"][arm]["exact_match"]
        print(f"{arm:14}{row['nll']:8.3f}{row['kl']:8.3f}{row['top1']:8.3f}{facts:8.2f}")
    print("\n".join(lines(certificate)))


@contextmanager
def server(target: Path, wmatrix: Path) -> Iterator[openai.OpenAI]:
    """vLLM's server on the target with the plugin; its log goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = home() / "demo" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "awareness_vllm.cli.main",
        "serve",
        target,
        "--wmatrix",
        wmatrix,
    ]
    command += [
        "--port",
        str(port),
        "--max-model-len",
        "4096",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "1G",
        "--served-model-name",
        "gemma3-270m",
    ]
    print(f"\nstarting vLLM on {target.name} (log: {log})", flush=True)
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait_until_ready(process, client, log)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: subprocess.Popen, client: openai.OpenAI, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def ask(client: openai.OpenAI, memory: str, case: dict[str, str]) -> None:
    """The same question without the memory, with it, and with the text in the prompt."""
    print(f"\nasked: {case['question'].strip()!r} — right answer: {case['answer'].strip()!r}")
    for name, prompt, ids in (
        ("(a) without memory", case["question"], []),
        ("(b) with the memory", case["question"], [memory]),
        ("(c) text in the prompt", case["context"] + case["question"], []),
    ):
        answer = client.completions.create(
            model="gemma3-270m",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            stop="\n",
            extra_body={"memory_ids": ids} if ids else None,
        )
        print(f"  {name:24}{answer.choices[0].text.strip()!r}")


def time_to_first_token(client: openai.OpenAI, memories: dict[str, str]) -> None:
    """Each document once natively, then its memory cold, warm (another salt) and hot."""
    seconds: dict[str, list[float]] = {"native": [], "cold": [], "warm": [], "hot": []}
    prompt = "\n\nIn short, the text says that"
    first_token(client, prompt, {})  # the server's own warm-up, in nobody's time
    for i, memory in enumerate(memories.values()):
        seconds["native"].append(first_token(client, long_text(i) + prompt, {}))
        for temperature, salt in (("cold", "a"), ("warm", "b"), ("hot", "b")):
            body = {"memory_ids": [memory], "cache_salt": salt}
            seconds[temperature].append(first_token(client, prompt, body))
    native = statistics.median(seconds["native"])
    print(f"\ntime to first token, {MEMORY_TOKENS} tokens, median of {len(memories)} documents")
    for temperature, values in seconds.items():
        median = statistics.median(values)
        print(f"  {temperature:8}{1000 * median:8.0f} ms{native / median:8.1f} ×")


def first_token(client: openai.OpenAI, prompt: str, body: dict) -> float:
    """Seconds from sending a streamed request to its first token."""
    started = time.perf_counter()
    stream = client.completions.create(
        model="gemma3-270m",
        prompt=prompt,
        max_tokens=2,
        temperature=0,
        stream=True,
        extra_body=body,
    )
    next(iter(stream))
    elapsed = time.perf_counter() - started
    for _ in stream:
        continue
    return elapsed


if __name__ == "__main__":
    main()
