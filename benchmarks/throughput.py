"""The throughput of plain requests on `awareness serve`, beside stock vLLM.

    python benchmarks/throughput.py --rounds 2 --bursts 8 [any flag of vllm serve, for both]

In each round the servers are started and sent bursts of the same prompts in turn, each time another
one first, so that other load of the machine affects all of them. No request names a memory.
`awareness` is the throughput with memories over that of stock vLLM, by pairs of bursts: the median,
and its 95 % bootstrap interval. `stock_again` is the same for a second server of stock vLLM: the
noise of the measurement.

On a CPU all servers get all cores (VLLM_CPU_OMP_THREADS_BIND, unless it is set): by itself vLLM
0.32 keeps one core free for the engine, and two, or none of two, where there is a KV connector.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.servers import AWARENESS, NAME, STOCK, running
from servers import FLAGS, machine, paired_ratio, smollm2, stop_on_terminate

from awareness_vllm.anchors.corpus import load
from awareness_vllm.models.tokens import load_tokenizer

ANSWER_SECONDS = 120.0
WARM_UP_SEED = 10**6
SETTLE_SECONDS = 3.0
"""The other server's processes look for work without sleeping for a second after their last."""
BIND = "VLLM_CPU_OMP_THREADS_BIND"


def held_out_ids(model: Path) -> list[int]:
    """A long held-out text in the model's tokens."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        install()
    text = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    ids: list[int] = load_tokenizer(str(model)).encode(text, add_special_tokens=False).ids
    return ids


def prompts(ids: list[int], tokens: int, count: int, seed: int) -> list[list[int]]:
    """Stretches of a text from different begins, so that the prefix cache is of no use."""
    begins = random.Random(seed).sample(range(len(ids) - tokens), count)
    return [ids[begin : begin + tokens] for begin in begins]


async def drive(url: str, batch: list[list[int]], args: argparse.Namespace) -> float:
    """Send all requests, `concurrency` at a time; requests a second."""
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits) as client:
        waiting = iter(batch)

        async def work() -> None:
            for prompt in waiting:
                body = {
                    "model": NAME,
                    "prompt": prompt,
                    "max_tokens": args.output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                (await client.post("/v1/completions", json=body)).raise_for_status()

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(args.concurrency)))
        return len(batch) / (time.perf_counter() - began)


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All servers in turn: ratios of their requests per second."""
    store = scratch / "store"
    store.mkdir()
    commands: dict[str, tuple[Sequence[str], Sequence[object]]] = {
        "stock": (STOCK, ()),
        "stock_again": (STOCK, ()),
        "awareness": (AWARENESS, ("--store", store)),
    }
    ids = held_out_ids(args.model)
    figures: dict[str, list[float]] = {server: [] for server in commands}
    for number in range(args.rounds):
        with contextlib.ExitStack() as stack:
            urls = {}
            for server, (prefix, flags) in commands.items():
                log = scratch / f"{server}-{number}.log"
                started = running(prefix, args.model, [*args.flags, *flags], log)
                urls[server] = stack.enter_context(started).url
            warm_up = prompts(ids, args.prompt_tokens, args.requests, WARM_UP_SEED)
            for url in urls.values():
                asyncio.run(drive(url, warm_up, args))
            for burst in range(args.bursts):
                seed = number * args.bursts + burst
                batch = prompts(ids, args.prompt_tokens, args.requests, seed)
                for server in [*urls, *urls][burst % len(urls) :][: len(urls)]:
                    time.sleep(SETTLE_SECONDS)
                    figures[server].append(asyncio.run(drive(urls[server], batch, args)))
                print(number, burst, {a: round(f[-1], 3) for a, f in figures.items()},
                      file=sys.stderr)  # fmt: skip
    return {
        **{
            server: paired_ratio(values, figures["stock"])
            for server, values in figures.items()
            if server != "stock"
        },
        "requests_per_s": {a: round(statistics.median(f), 3) for a, f in figures.items()},
        "rounds": args.rounds,
        "bursts": args.bursts,
        "requests": args.requests,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "concurrency": args.concurrency,
        "model": args.model.name,
        "flags": args.flags,
        "cores": os.environ[BIND],
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bursts", type=int, default=8, help="for each server in each round")
    parser.add_argument("--requests", type=int, default=24, help="in each burst")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--output-tokens", type=int, default=32)
    args, args.flags = parser.parse_known_args()
    args.flags = args.flags or FLAGS
    args.model = args.model or smollm2()
    stop_on_terminate()
    os.environ.setdefault(BIND, ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare(args, Path(scratch))))


if __name__ == "__main__":
    main()
