"""Editions: what the requests after them take, and what users notice while they are made.

    python benchmarks/editions.py --rounds 4 [--policy always] [--wmatrix FILE] [serve flags]

SmolLM2's memories of 2,000 tokens on Gemma-3-270M. In each round every text is read natively, its
memory is used once, and when the server keeps its edition twice more: warm, then hot. A ratio is
native over the condition, by pairs of one text in one round: the median, with its 95 % bootstrap
interval. `made` is the time from the end of the use to the edition, with nothing else to do.

`stream` is the time between the tokens of a plain answer, its median and 99th percentile over all
rounds: alone, and with an edition in the making, which it interrupts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import numpy as np
from first_token import QUESTION, TEXTS, Client, first_tokens
from servers import about, arguments, served_texts

STREAM = 192
"""Tokens of a stream."""
PATIENCE_S = 120.0


def has_edition(client: Client, memory: str) -> bool:
    answer = client.http.get(f"/v1/memories/{memory}").raise_for_status()
    return bool(answer.json()["edition"])


def until_made(client: Client, memory: str) -> float:
    """Seconds until the server keeps a memory's edition."""
    began = time.perf_counter()
    while not has_edition(client, memory):
        if time.perf_counter() - began > PATIENCE_S:
            raise RuntimeError(f"no edition of {memory} after {PATIENCE_S:g} s")
        time.sleep(0.1)  # each look costs the server some of its time
    return time.perf_counter() - began


def gaps(client: Client) -> list[float]:
    """Seconds between the tokens of a plain answer."""
    times = [*client.tokens("Once upon a time", STREAM, cache_salt=client.salt())]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def measure(client: Client, contexts: dict[str, str], rounds: int) -> dict[str, Any]:
    client.first(QUESTION)
    gaps(client)
    seconds: dict[str, list[float]] = {}
    between: dict[str, list[float]] = {"alone": [], "edition in the making": []}
    made: list[float] = []
    interrupted = 0
    for _ in range(rounds):
        for memory, text in contexts.items():
            client.evict(memory)
            body = {"memory_ids": [memory]}
            natively = client.first(text + QUESTION, cache_salt=client.salt())
            seconds.setdefault("native", []).append(natively)
            first = client.first(QUESTION, cache_salt=client.salt(), **body)
            seconds.setdefault("before the edition", []).append(first)
            made.append(until_made(client, memory))
            salt = client.salt()
            for condition in ("edition, first request", "edition, second request"):
                again = client.first(QUESTION, cache_salt=salt, **body)
                seconds.setdefault(condition, []).append(again)
            between["alone"] += gaps(client)
            client.evict(memory)
            client.first(QUESTION, cache_salt=client.salt(), **body)
            time.sleep(0.2)  # it has begun
            between["edition in the making"] += gaps(client)
            interrupted += not has_edition(client, memory)
            until_made(client, memory)
    return {
        **first_tokens(seconds),
        "made_s": round(statistics.median(made), 2),
        "interrupted": interrupted,
        **streams(between),
    }


def streams(between: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and 99th percentiles, and the quotient of the latter."""
    p99 = {name: float(np.quantile(values, 0.99)) for name, values in between.items()}
    alone, making = p99.values()
    return {
        "stream_ms": {
            name: {
                "median": round(1e3 * statistics.median(values), 2),
                "p99": round(1e3 * p99[name], 2),
                "longest": round(1e3 * max(values), 1),
            }
            for name, values in between.items()
        },
        "p99_ratio": round(making / alone, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--policy", choices=["idle", "always"], default="idle")
    args, flags = arguments(parser)
    with served_texts(args, [*flags, "--editions", args.policy], TEXTS) as (url, contexts):
        values = measure(Client(url), contexts, args.rounds)
    print(json.dumps(values | {"policy": args.policy} | about(args)))


if __name__ == "__main__":
    main()
