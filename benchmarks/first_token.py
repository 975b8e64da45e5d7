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

    python benchmarks/first_token.py --latent 300 2000 --rounds 8

Memories as served by default, beside their latents and those in int8 (`awareness export`). In each
round, for every text, the forms and reading it natively take turns, which the next round has in
reverse. A form is loaded when its file is *new* to the server, *cold* (evicted, its file checked
before) and *warm*, each time under another salt. Seconds are to a whole answer of one token, whose
report must say `load` and that temperature: what says anything else is refused, and that text's
round is left out. Fails if one was; `same token` counts answers like the plain package's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from awareness_demo.servers import NAME
from servers import (
    ALIGNED,
    about,
    arguments,
    paired_ratio,
    served_texts,
    serving,
    stretches,
    written_id,
)

from awareness_vllm.packages.store import file_of

TEXTS = 3
QUESTION = "\n\nIn one sentence, this text is about"
WORD = re.compile(r"[A-Za-z]{5,}")


def question_about(text: str, number: int) -> str:
    """A question with the words of one of the text's sentences, another one for each number."""
    sentences = [words for s in text.split(". ") if len(words := WORD.findall(s)) >= 8]
    sentences = sentences or [WORD.findall(text)]
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


NATIVE, FORMS = "native", ("plain", "latent", "int8")
INT8 = ["--int8"]


@dataclass
class Turns:
    """Answers to questions about texts of one length, from the texts and their memories' forms,
    whose IDs are in the order of FORMS: by arm the seconds of each answer, not a number where it
    was no load of the arm's temperature, and its token."""

    client: Client
    store: Path
    texts: Mapping[str, Sequence[str]]
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, rounds: int) -> None:
        """Every arm of every text in every round, after one that counts for nothing."""
        for number in range(rounds + 1):
            if number == 1:
                self.seconds.clear()
                self.tokens.clear()
            for text, ids in self.texts.items():
                question = question_about(text, number)
                turns = [(NATIVE, ""), *zip(FORMS, ids, strict=True)]
                for form, memory in reversed(turns) if number % 2 else turns:
                    if form == NATIVE:
                        self.ask(NATIVE, text + question)
                        continue
                    (self.store / file_of(memory)).touch()  # another version: it is checked again
                    for when in ("new", "cold", "warm"):
                        if when != "warm":
                            self.client.evict(memory)
                        self.ask(f"{form}, {when}", question, memory)

    def ask(self, arm: str, prompt: str, memory: str | None = None) -> None:
        """An answer of one token, natively or from a memory's load."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        body |= {"cache_salt": self.client.salt()} | ({"memory_ids": [memory]} if memory else {})
        began = time.perf_counter()
        response = self.client.http.post("/v1/completions", json=body)
        took = time.perf_counter() - began
        answer = response.raise_for_status().json()
        if memory and not is_load(answer["memory"], "warm" if arm.endswith("warm") else "cold"):
            print(f"refused as {arm}: {answer['memory']}", file=sys.stderr)
            took = math.nan
        self.seconds[arm].append(took)
        self.tokens[arm].append(answer["choices"][0]["text"])

    def figures(self) -> dict[str, Any]:
        """Milliseconds, how many times sooner than natively, and shares of the plain form's time,
        of the rounds and texts that no arm was refused in."""
        table = np.array(list(self.seconds.values()))
        refused = np.isnan(table)
        counted = dict(zip(self.seconds, table[:, ~refused.any(0)], strict=True))
        rows: dict[str, Any] = {}
        for arm, seconds in counted.items() if len(counted[NATIVE]) else ():
            form, _, when = arm.partition(", ")
            row = rows[arm] = {"ms": round(1e3 * statistics.median(seconds), 1)}
            if form != NATIVE:
                row["sooner than native"] = paired_ratio(counted[NATIVE], seconds)
            if form not in (NATIVE, "plain"):
                row["of plain"] = paired_ratio(seconds, counted[f"plain, {when}"])
                row["same token"] = self.same(arm, f"plain, {when}")
        return {
            "n": len(counted[NATIVE]),
            "refused": int(refused.sum()),
            "first_token": rows,
            "bytes": {form: self.bytes(i) for i, form in enumerate(FORMS)},
        }

    def same(self, arm: str, other: str) -> str:
        """How many answers of two arms have the same token."""
        pairs = [*zip(self.tokens[arm], self.tokens[other], strict=True)]
        return f"{sum(one == two for one, two in pairs)} of {len(pairs)}"

    def bytes(self, form: int) -> int:
        """Bytes of all texts' memories in a form."""
        return sum((self.store / file_of(ids[form])).stat().st_size for ids in self.texts.values())


def is_load(report: Mapping[str, Any], temperature: str) -> bool:
    """Whether a report on a response's memories is of a load of this temperature."""
    return (report["plan"], report.get("temperature")) == ("load", temperature)


def measure_forms(args: argparse.Namespace, flags: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The figures of each length, all of one server."""
    texts = stretches(args.target, [length for length in args.latent for _ in range(TEXTS)])
    window = ["--max-model-len", str(max(4096, 2 * max(args.latent)))]
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        export = ["--store", store, "--latent", args.wmatrix, "--target", args.target]
        ends = args.source, args.target, args.wmatrix
        with serving(*ends, texts, [*flags, *window], store) as (url, contexts):
            forms = {
                text: [memory, *(written_id("export", memory, *export, *i) for i in ([], INT8))]
                for memory, text in contexts.items()
            }
            left = iter(forms.items())
            for length in args.latent:
                turns = Turns(Client(url), store, dict(itertools.islice(left, TEXTS)))
                turns.measure(args.rounds)
                found[length] = turns.figures()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--latent", type=int, nargs="+", metavar="TOKENS", help="latents of memories so long"
    )
    args, flags = arguments(parser)
    if args.latent:
        found = measure_forms(args, [*flags, *ALIGNED])
        print(
            json.dumps({"lengths": found, "texts": TEXTS} | about(args) | {"tokens": args.latent})
        )
        sys.exit(1 if any(figures["refused"] for figures in found.values()) else 0)
    with served_texts(args, [*flags, *ALIGNED], TEXTS) as (url, contexts):
        values = measure(Client(url), contexts, args.rounds)
    print(json.dumps(values | {"texts": TEXTS} | about(args)))


if __name__ == "__main__":
    main()
