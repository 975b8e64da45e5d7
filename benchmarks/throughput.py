"""What plain requests lose on a server with memories: stock vLLM beside `awareness serve`.

    python benchmarks/throughput.py --rounds 4 [any flag of vllm serve, for both]

One server at a time, in the order A/B/A/B …, so that what else the machine does falls on both. None
of the requests names a memory. `ratio` is the throughput with memories over that of stock vLLM, by
pairs of neighbouring rounds; `spread` is its smallest and largest value.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from servers import AWARENESS, FLAGS, NAME, STOCK, running, smollm2, stop_on_terminate

from awareness_vllm.anchors.corpus import load
from awareness_vllm.anchors.install import held_out_dir, install
from awareness_vllm.anchors.spans import load_tokenizer
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving.register import vllm_version

ANSWER_SECONDS = 120.0


def held_out_ids(model: Path) -> list[int]:
    """A long text that no anchor came from, in the model's tokens."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        install()
    text = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    ids: list[int] = load_tokenizer(str(model)).encode(text, add_special_tokens=False).ids
    return ids


def prompts(ids: list[int], tokens: int, count: int, seed: int) -> list[list[int]]:
    """Stretches of a text; each begins elsewhere, so that the prefix cache helps nobody."""
    begins = random.Random(seed).sample(range(len(ids) - tokens), count)
    return [ids[begin : begin + tokens] for begin in begins]


async def drive(url: str, asked: list[list[int]], args: argparse.Namespace) -> float:
    """Send all requests, `concurrency` at a time; requests a second."""
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits) as client:
        waiting = iter(asked)

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
        return len(asked) / (time.perf_counter() - began)


def measure(
    prefix: Sequence[str], flags: Sequence[object], ids: list[int], seed: int, log: Path,
    args: argparse.Namespace,
) -> float:  # fmt: skip
    """One server's throughput, after requests that only warm it up."""
    with running(prefix, args.model, [*args.flags, *flags], log) as server:
        first = prompts(ids, args.prompt_tokens, args.concurrency, -1)
        asyncio.run(drive(server.url, first, args))
        asked = prompts(ids, args.prompt_tokens, args.requests, seed)
        return asyncio.run(drive(server.url, asked, args))


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both servers in turn; the same prompts in both of a round."""
    store = scratch / "store"
    store.mkdir()
    arms: dict[str, tuple[Sequence[str], Sequence[object]]] = {
        "stock": (STOCK, ()),
        "awareness": (AWARENESS, ("--store", store)),
    }
    ids = held_out_ids(args.model)
    figures: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds):
        for arm, (prefix, flags) in arms.items():
            log = scratch / f"{arm}-{number}.log"
            figures[arm].append(measure(prefix, flags, ids, number, log, args))
            print(f"round {number}, {arm}: {figures[arm][-1]:.3f} requests/s", file=sys.stderr)
    ratios = [a / s for a, s in zip(figures["awareness"], figures["stock"], strict=True)]
    return {
        "requests_per_s": {arm: [round(f, 3) for f in found] for arm, found in figures.items()},
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "rounds": args.rounds,
        "requests": args.requests,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "concurrency": args.concurrency,
        "model": args.model.name,
        "flags": args.flags,
        "hardware": hardware(),
        "versions": {**versions(), "vllm": vllm_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=96, help="in each round")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--output-tokens", type=int, default=32)
    args, args.flags = parser.parse_known_args()
    args.flags = args.flags or FLAGS
    args.model = args.model or smollm2()
    stop_on_terminate()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare(args, Path(scratch))))


if __name__ == "__main__":
    main()
