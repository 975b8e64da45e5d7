"""What engine tests share: the command line as scripts call it, a server as operators start it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
from openai.types.completion_choice import Logprobs

from awareness_vllm.models.hf import load_model
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.serving.params import SECRET

CLI = (sys.executable, "-m", "awareness_vllm.cli.main")
NEAR_TIE = 0.15
"""Nats. A bfloat16 logit near 20 is rounded to steps of 0.125: smaller gaps are undecided."""

EAGER = ("--enforce-eager", "--kv-cache-memory-bytes", "1G", "--max-model-len", "4096")
EAGER += ("--editions", "never")  # what a memory is worth without them is measured here


@dataclass(frozen=True)
class Run:
    """What one `awareness … --json` printed."""

    status: int
    out: dict
    stderr: str


def awareness(*args: object) -> Run:
    """Run a subcommand with `--json`; its stdout must be one JSON document."""
    done = subprocess.run([*CLI, *map(str, args), "--json"], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1, (done.stdout, done.stderr[-3000:])
    return Run(done.returncode, json.loads(done.stdout), done.stderr)


def captured(model: Path, text: str, store: Path, *flags: str) -> str:
    """Capture a text into a store; the memory's ID. Without flags it is done in this process, whose
    models stay loaded; with flags by `awareness capture`."""
    if not flags:
        return publish(capture(model, text, model=loaded(model)), store).stem
    file = store.parent / "text.txt"
    file.write_text(text)
    run = awareness("capture", "--model", model, "--text", file, "--store", store, *flags)
    assert run.status == 0, run.stderr[-3000:]
    return run.out["id"]


loaded = functools.cache(load_model)


def parting(native: Logprobs, other: Logprobs) -> float:
    """How far two greedy answers to the same tokens part.

    0.0 where all tokens agree; else the gap, in nats, between the two tokens at the first
    difference in the native distribution: a near-tie is rounding, anything else is a fault.
    """
    assert native.tokens
    assert native.top_logprobs
    for right, found, top in zip(native.tokens, other.tokens, native.top_logprobs, strict=True):
        if right != found:
            return top[right] - top.get(found, -float("inf"))
    return 0.0


def logprobs_of(response: httpx.Response) -> Logprobs:
    """The only choice's, of a completion or a chat."""
    (choice,) = response.json()["choices"]
    found = choice["logprobs"]
    if "content" in found:
        tops = [{t["token"]: t["logprob"] for t in at["top_logprobs"]} for at in found["content"]]
        found = {
            "tokens": [at["token"] for at in found["content"]],
            "token_logprobs": [at["logprob"] for at in found["content"]],
            "top_logprobs": tops,
        }
    return Logprobs.model_validate(found)


def assert_same(
    expected: httpx.Response, other: httpx.Response, rounding: float = NEAR_TIE
) -> None:
    """Two greedy answers are one, but for what another batch rounds otherwise: they part at a tie
    if at all, and their tokens are as likely until then."""
    one, two = logprobs_of(expected), logprobs_of(other)
    assert parting(one, two) <= NEAR_TIE, (one.tokens, two.tokens)
    assert one.token_logprobs
    assert two.token_logprobs
    pairs = zip(one.tokens, two.tokens, one.token_logprobs, two.token_logprobs, strict=True)
    gaps = [abs(a - b) for left, right, a, b in itertools.takewhile(lambda p: p[0] == p[1], pairs)]
    print("parting", parting(one, two), "apart", gaps)
    assert max(gaps, default=0.0) <= rounding, gaps


@dataclass
class Server:
    """A running `awareness serve`, its client and its log."""

    client: openai.OpenAI
    url: str
    log: Path
    process: subprocess.Popen

    def complete(self, prompt: str, tokens: int = 16, **body: object) -> str:
        answer = self.client.completions.create(
            model="served", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=body
        )
        return answer.choices[0].text

    def logprobs(self, prompt: str, tokens: int = 16, **body: object) -> Logprobs:
        """The greedy tokens of an answer, and the likeliest at each place."""
        answer = self.client.completions.create(
            model="served", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=5,
            extra_body=body,
        )  # fmt: skip
        assert answer.choices[0].logprobs
        return answer.choices[0].logprobs

    def differs_from_native(self, text: str, question: str, memory: str, tokens: int = 64) -> float:
        """How far greedy answers from a same-model memory and from native prefill part."""
        native = self.logprobs(text + question, tokens)
        return parting(native, self.logprobs(question, tokens, memory_ids=[memory]))

    def first_token(self, prompt: str, **body: object) -> float:
        """Seconds from a streamed request to its first token."""
        started = time.perf_counter()
        stream = self.client.completions.create(
            model="served", prompt=prompt, max_tokens=2, temperature=0, stream=True, extra_body=body
        )
        next(iter(stream))
        seconds = time.perf_counter() - started
        list(stream)
        return seconds

    def loads(self) -> list[str]:
        """The connector's lines about loads: memory, tokens, temperature."""
        return [line for line in self.log.read_text().splitlines() if "] loaded mem_" in line]


@contextlib.contextmanager
def paused(server: Server) -> Iterator[None]:
    """Within, the engine's processes stand still; the API's goes on."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def serving(
    model: Path, store: Path, log: Path, *flags: object, **variables: str
) -> Iterator[Server]:
    """Start a server, in this environment and these variables, wait until it answers, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*CLI, "serve", model, "--store", store, "--port", port, *EAGER, *flags]
    command += ["--served-model-name", "served"]
    # A server makes its own secret; this process may have one, from which tests forge salts.
    environment = {name: value for name, value in os.environ.items() if name != SECRET} | variables
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield Server(client, url, log, process)
    finally:
        process.terminate()
        process.wait(60)
