"""Time to first token with a memory, beside reading its text on the same server.

    python benchmarks/first_token.py --rounds 4 [--wmatrix FILE] [any flag of vllm serve]

SmolLM2's memories of 2,000 tokens on Gemma-3-270M, without editions. In each round every text is
read natively, the question is asked alone (the lower bound), and the memory is loaded cold (evicted
before), warm (a new question), hot (that question again) and known (the first question again under
another salt); then with passages re-read in place instead of quoted, and with neither. A ratio is
native over the condition, by pairs of one text in one round: the median, with its 95 % bootstrap
interval.

`stall` is another request's longest wait for a token while nothing else runs, while a cold memory
is loaded, and while its text is read natively instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
from awareness_demo.servers import NAME
from servers import ALIGNED, about, arguments, paired_ratio, served_texts

TEXTS = 3
QUESTION = "\n\nIn one sentence, this text is about"
WORD = re.compile(r"[A-Za-z]{5,}")


def question_about(text: str, number: int) -> str:
    """A question with the words of one of the text's sentences, another one for each number."""
    sentences = [words for s in text.split(". ") if len(words := WORD.findall(s)) >= 8]
    words = sentences[(7 * number + 3) % len(sentences)]
    asked = " ".join(sorted(words, key=len)[-3:])
    return f"\n\nWhat does the text say about {asked}? It says that"


class Client:
    """A client of one server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.salts = itertools.count()

    def tokens(self, prompt: str, count: int, **body: Any) -> Iterator[float]:
        """The time of each token of an answer."""
        request = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0}
        request |= {"stream": True, "ignore_eos": True, **body}
        with self.http.stream("POST", "/v1/completions", json=request) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield time.perf_counter()

    def first(self, prompt: str, **body: Any) -> float:
        """Seconds to the first token."""
        began = time.perf_counter()
        times = list(self.tokens(prompt, 2, **body))
        return times[0] - began

    def salt(self) -> str:
        return f"salt-{next(self.salts)}"

    def evict(self, memory: str) -> None:
        self.http.delete(f"/v1/memories/{memory}").raise_for_status()

    def longest_wait(self, prompt: str | None, **body: Any) -> float:
        """Seconds of a plain answer's longest wait for a token beside another prompt."""
        times: list[float] = []

        def listen() -> None:
            times.extend(self.tokens("Once upon a time", 64, cache_salt=self.salt()))

        stream = threading.Thread(target=listen)
        stream.start()
        time.sleep(0.3)
        if prompt is not None:
            list(self.tokens(prompt, 2, **body))
        stream.join()
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def first_tokens(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds to first tokens by condition, as medians and as ratios to *native*."""
    native = seconds["native"]
    return {
        "native_ms": round(1e3 * statistics.median(native)),
        "first_token": {
            condition: {
                "ms": round(1e3 * statistics.median(values), 1),
                **paired_ratio(native, values),
            }
            for condition, values in seconds.items()
            if condition != "native"
        },
    }


def measure(client: Client, contexts: dict[str, str], rounds: int) -> dict[str, Any]:
    """Every condition for every memory, in every round."""
    client.first(QUESTION)
    seconds: dict[str, list[float]] = {}
    stalls: dict[str, list[float]] = {}
    for number in range(rounds):
        for memory, text in contexts.items():
            client.evict(memory)
            first, new, third = (question_about(text, 3 * number + i) for i in range(3))
            place = {"memory": {"ids": [memory], "quote": 0}}
            off = {"memory": {"ids": [memory], "reread": 0, "quote": 0}}
            salt, again = client.salt(), client.salt()
            for condition, prompt, body in (
                ("native", text + first, {"cache_salt": salt}),
                ("question alone", first, {"cache_salt": salt}),
                ("cold", first, {"memory_ids": [memory], "cache_salt": salt}),
                ("warm", new, {"memory_ids": [memory], "cache_salt": again}),
                ("hot", new, {"memory_ids": [memory], "cache_salt": again}),
                ("known", first, {"memory_ids": [memory], "cache_salt": client.salt()}),
                ("cold, re-read", first, {**place, "cache_salt": client.salt()}),
                ("warm, re-read", third, {**place, "cache_salt": client.salt()}),
                ("warm, the memory alone", new, {**off, "cache_salt": salt}),
                ("cold, the memory alone", first, {**off, "cache_salt": again}),
            ):
                if condition.startswith("cold,"):
                    client.evict(memory)
                seconds.setdefault(condition, []).append(client.first(prompt, **body))
            client.evict(memory)
            salt, body = client.salt(), {"memory_ids": [memory], "cache_salt": client.salt()}
            for condition, wait in (
                ("alone", client.longest_wait(None)),
                ("cold", client.longest_wait(QUESTION, **body)),
                ("native", client.longest_wait(text + QUESTION, cache_salt=salt)),
            ):
                stalls.setdefault(condition, []).append(wait)
    return {
        **first_tokens(seconds),
        "stall_ms": {
            condition: round(1e3 * statistics.median(values))
            for condition, values in stalls.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    args, flags = arguments(parser)
    with served_texts(args, [*flags, *ALIGNED], TEXTS) as (url, contexts):
        values = measure(Client(url), contexts, args.rounds)
    print(json.dumps(values | {"texts": TEXTS} | about(args)))


if __name__ == "__main__":
    main()
