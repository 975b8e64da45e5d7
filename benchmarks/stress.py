"""A stress test: many streams over a few memories on a server with too small a KV cache.

    python benchmarks/stress.py --seconds 300 --streams 64

A float32 server of SmolLM2 with memories of SmolLM2 itself first answers each request alone. Then
the streams send them at random (60 % with one or two memories, 30 % plain, 10 % given up on the
way), while a small KV cache forces preemptions. It fails (status 1) where a greedy answer differs
from the one given alone (but for near-ties of the two best tokens), a request hangs or is refused,
a load fails, no request was preempted, or the idle server does not answer or has blocks in use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from awareness_demo.anchors import held_out_dir
from awareness_demo.servers import AWARENESS, NAME, Running, running
from servers import machine, smollm2, stop_on_terminate

from awareness_vllm.anchors.corpus import load
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.tokens import load_tokenizer
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish

MEMORIES = 8
BLOCK = 128
"""Tokens in a block of vLLM's CPU backend."""
MAX_MODEL_LEN = 2048
BLOCKS_PER_STREAM = 2.0
"""A request takes three to seven blocks: a fraction of the streams fits, and has to grow."""
OUTPUT_TOKENS = (32, 64, 128)
"""Long enough that requests need blocks which others have taken since they began."""
NEAR_TIE = 0.005
"""Nats. Float32 logits near 20 differ by some 1e-4 between batches, after thirty layers."""
IDLE_SECONDS = 60.0
SHOWN = 10
QUESTIONS = (
    "\n\nIn short, the text says that the",
    "\n\nQuestion: what happened first?\nAnswer:",
    "\n\nThe most important name in it is",
)
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "loads": "vllm:awareness_loads_total",
    "failed_loads": "vllm:awareness_failures_total",
}


@dataclass(frozen=True)
class Ask:
    """A request; `kind` is by the number of its memories."""

    kind: str
    prompt: str
    memories: tuple[str, ...]
    tokens: int

    @property
    def body(self) -> dict[str, Any]:
        named = {"memory_ids": list(self.memories)} if self.memories else {}
        return {
            "model": NAME, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0,
            "ignore_eos": True, "logprobs": 5, **named,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer: its tokens, and the five most likely at each position with log probabilities."""

    text: str
    tokens: list[str]
    top: list[dict[str, float]]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Answer:
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]
        return cls(choice["text"], logprobs["tokens"], logprobs["top_logprobs"])


@dataclass
class Tally:
    """The results of the requests so far."""

    finished: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def compare(self, ask: Ask, alone: Answer, reply: Answer) -> None:
        """Record where an answer differs from the one given alone."""
        self.finished[ask.kind] += 1
        if reply.text == alone.text:
            return
        difference = first_difference(alone, reply)
        entry = {"kind": ask.kind, "memories": list(ask.memories), **difference}
        known = self.near_ties if difference["gap"] <= NEAR_TIE else self.mismatches
        known.append(entry)


def first_difference(alone: Answer, reply: Answer) -> dict[str, Any]:
    """The first position where two answers differ, and the gap in nats between their tokens."""
    pairs = zip(alone.tokens, reply.tokens, alone.top, strict=False)
    for place, (right, wrong, top) in enumerate(pairs):
        if right != wrong:
            gap = top[right] - top.get(wrong, -float("inf"))
            return {"place": place, "alone": right, "found": wrong, "gap": min(gap, 99.0)}
    return {"place": len(reply.tokens), "alone": alone.text, "found": reply.text, "gap": 99.0}


# The server and its requests


def texts(model: Path, rng: random.Random) -> list[str]:
    """As many stretches of a held-out text as there are memories, of different lengths, and as many
    short ones for plain requests."""
    whole = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer.encode(whole, add_special_tokens=False).ids
    stretches, begin = [], 0
    for number in range(2 * MEMORIES):
        length = rng.randint(200, 420) if number < MEMORIES else rng.randint(60, 240)
        stretches.append(tokenizer.decode(ids[begin : begin + length]))
        begin += length
    return stretches


def make_requests(memories: list[str], plain: list[str], rng: random.Random) -> list[Ask]:
    """The requests of the streams."""
    pairs = list(zip(memories, memories[1:] + memories[:1], strict=True))
    named = [
        *(("one memory", (memory,), "") for memory in memories),
        *(("two memories", pair, "") for pair in pairs),
        *(("plain", (), text) for text in plain),
    ]
    return [
        Ask(kind, text + rng.choice(QUESTIONS), chosen, rng.choice(OUTPUT_TOKENS))
        for kind, chosen, text in named
    ]


def flags(model: Path, streams: int, store: Path) -> list[object]:
    """Flags of a float32 server whose KV cache is too small for its streams."""
    token = geometry_of(model).width * 4
    blocks = max(MAX_MODEL_LEN // BLOCK + 2, int(BLOCKS_PER_STREAM * streams))
    return [
        "--store", store, "--dtype", "float32", "--enforce-eager", "--block-size", BLOCK,
        "--kv-cache-memory-bytes", blocks * BLOCK * token, "--max-num-seqs", streams,
        "--max-model-len", MAX_MODEL_LEN,
    ]  # fmt: skip


async def answer(client: httpx.AsyncClient, ask: Ask) -> Answer:
    response = await client.post("/v1/completions", json=ask.body)
    response.raise_for_status()
    return Answer.of(response.json())


async def give_up(client: httpx.AsyncClient, ask: Ask, rng: random.Random) -> bool:
    """Stream an answer and disconnect after some tokens or some time; False where the answer was
    complete before."""
    most = rng.randint(1, ask.tokens - 1) if rng.random() < 0.5 else ask.tokens
    seconds = rng.uniform(0.01, 3) if most == ask.tokens else None
    try:
        async with (
            asyncio.timeout(seconds),
            client.stream("POST", "/v1/completions", json={**ask.body, "stream": True}) as stream,
        ):
            if stream.is_error:
                await stream.aread()  # for the message, while the stream is open
            stream.raise_for_status()
            chunks = 0
            async for line in stream.aiter_lines():
                chunks += line.startswith("data: {")
                if chunks >= most:
                    return True
    except TimeoutError:
        return True
    return False


async def metrics(client: httpx.AsyncClient, names: dict[str, str]) -> dict[str, float]:
    """Sums over all labels of some of the server's metrics."""
    text = (await client.get("/metrics")).text
    return {
        short: sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        for short, name in names.items()
    }


async def stream_of(
    client: httpx.AsyncClient, known: dict[Ask, Answer], tally: Tally, deadline: float,
    rng: random.Random,
) -> None:  # fmt: skip
    """One stream: a request after the other until the time is over."""
    by_kind: dict[bool, list[Ask]] = {False: [], True: []}
    for ask in known:
        by_kind[bool(ask.memories)].append(ask)
    while time.monotonic() < deadline:
        kind = rng.choices(("memory", "plain", "cancelled"), (60, 30, 10))[0]
        ask = rng.choice(by_kind[kind == "memory" or (kind == "cancelled" and rng.random() < 0.7)])
        began = time.monotonic()
        try:
            if kind == "cancelled":
                tally.cancelled["given up" if await give_up(client, ask, rng) else "too late"] += 1
            else:
                tally.compare(ask, known[ask], await answer(client, ask))
                tally.seconds.append(time.monotonic() - began)
        except httpx.TimeoutException:
            tally.hangs.append(f"{ask.kind} {ask.memories} after {time.monotonic() - began:.0f} s")
        except httpx.HTTPStatusError as error:
            tally.errors.append(f"{error.response.status_code}: {error.response.text[:300]}")
        except httpx.TransportError as error:
            tally.errors.append(f"{ask.kind}: {error!r}")
            await asyncio.sleep(1)  # a server that is gone refuses in no time


async def until_idle(client: httpx.AsyncClient) -> dict[str, float]:
    """The gauges, as soon as nothing runs or waits, or after a minute."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        gauges = await metrics(client, GAUGES)
        if gauges["running"] + gauges["waiting"] == 0 or time.monotonic() > deadline:
            return gauges
        await asyncio.sleep(0.5)


async def after(client: httpx.AsyncClient, known: dict[Ask, Answer]) -> dict[str, Any]:
    """Whether the server still answers as before, and its gauges when idle."""
    one_of_each = {ask.kind: ask for ask in known}
    alive = {}
    try:
        await until_idle(client)
        # Gauges are set by steps of the engine: aborts alone would leave the last step's.
        for kind, ask in one_of_each.items():
            alive[kind] = (await answer(client, ask)).text == known[ask].text
        gauges = await until_idle(client)
    except httpx.HTTPError as error:
        return {"alive": False, "error": repr(error)}
    return {"alive": all(alive.values()), **gauges}


async def stress(
    server: Running, memories: list[str], plain: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Each request alone, then all of them together."""
    rng = random.Random(args.seed)
    limits = httpx.Limits(max_connections=args.streams + 1)
    client = httpx.AsyncClient(base_url=server.url, timeout=args.patience, limits=limits)
    tally = Tally()
    async with client:
        began = time.monotonic()
        known = {ask: await answer(client, ask) for ask in make_requests(memories, plain, rng)}
        alone = time.monotonic() - began
        print(f"{len(known)} requests alone: {alone:.0f} s", file=sys.stderr)
        before = await metrics(client, COUNTERS)
        began = time.monotonic()
        await asyncio.gather(
            *(
                stream_of(
                    client, known, tally, began + args.seconds, random.Random(f"{args.seed} {n}")
                )
                for n in range(args.streams)
            )
        )
        seconds = time.monotonic() - began
        idle = await after(client, known)
        counted = await metrics(client, COUNTERS) if idle["alive"] else {}
    return {
        "seconds": round(seconds, 1),
        "seconds_alone": round(alone, 1),
        "finished": dict(tally.finished),
        "cancelled": dict(tally.cancelled),
        "slowest_s": round(max(tally.seconds, default=0.0), 1),
        "near_ties": {"count": len(tally.near_ties), "first": tally.near_ties[:SHOWN]},
        "mismatches": {"count": len(tally.mismatches), "first": tally.mismatches[:SHOWN]},
        "hangs": {"count": len(tally.hangs), "first": tally.hangs[:SHOWN]},
        "errors": {"count": len(tally.errors), "first": tally.errors[:SHOWN]},
        **{name: int(value - before[name]) for name, value in counted.items()},
        "idle": idle,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """The requirements that do not hold."""
    idle = result["idle"]
    wrong = {
        "answers differ": result["mismatches"]["count"],
        "requests hang": result["hangs"]["count"],
        "requests are refused": result["errors"]["count"],
        "loads fail": result.get("failed_loads"),
        "nothing was preempted": result.get("preemptions") == 0,
        "nothing was compared": not sum(result["finished"].values()),
        "the server does not answer as before": not idle["alive"],
        "requests stay": idle.get("running", 0) + idle.get("waiting", 0),
        "blocks stay": idle.get("kv_cache_usage", 0) > 1e-9,
    }
    return [what for what, present in wrong.items() if present]


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Capture the memories, start the server, stress it."""
    stretches = texts(args.model, random.Random(args.seed))
    store = scratch / "store"
    memories = [publish(capture(args.model, text), store).stem for text in stretches[:MEMORIES]]
    log = args.log or scratch / "server.log"
    with running(AWARENESS, args.model, flags(args.model, args.streams, store), log) as server:
        result = asyncio.run(stress(server, memories, stretches[MEMORIES:], args))
        # Before the server is stopped, which it logs as an error of its engine.
        complaints = [line[:300] for line in log.read_text().splitlines() if " ERROR " in line]
    failed = failures(result)
    return {
        "ok": not failed,
        "failures": failed,
        "streams": args.streams,
        "memories": len(memories),
        **result,
        "server_errors": {"count": len(complaints), "first": complaints[:SHOWN]},
        "model": args.model.name,
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--patience", type=float, default=180, help="seconds; longer is a hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the server's log stays")
    args = parser.parse_args()
    args.model = args.model or smollm2()
    stop_on_terminate()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(args, Path(scratch))
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
