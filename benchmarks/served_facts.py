"""Facts through a running server with default settings, beside what the same cost buys otherwise.

    python benchmarks/served_facts.py [--lengths 300 1000 2000] [--limit N] [--wmatrix FILE]
        [--out docs/figures/served-facts.json] [any flag of vllm serve]

Needles of several kinds, hidden in foreign prose (`held-out/needles`; of the two halves the one
that no choice was made on). SmolLM2's memories on Gemma-3-270M, in these arms:

- *native*: the text in the prompt;
- *memory*: loaded, nothing re-read and nothing quoted;
- *reread*: the passages that the question points at re-read in place;
- *default*: loaded as a server does by default: these passages quoted;
- *truncation*, *quotes* and *bm25*: the last tokens of the text, the passages that the server would
  choose for the question, and those that BM25 alone ranks first, each as a plain prompt of as many
  tokens as the operations of *default* for this question buy. Passages stand in it as a server
  quotes them; the few tokens that this form has are given to them.

An answer is right if the greedy one begins with the expected one. Shares are of native; a margin
is *default* less the best of the three, and less each. `first_token_ms` are medians;
every arm begins cold, with nothing of it cached, but for *warm* (aligned states kept) and *hot*
(blocks kept). Editions are off: they would make every later answer exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from awareness_demo.anchors import held_out_dir
from awareness_demo.servers import AWARENESS, NAME, running
from servers import ALIGNED, FLAGS, demo, demo_map, machine, smollm2, stop_on_terminate

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.cli.eval import read_cases
from awareness_vllm.evaluate.bootstrap import margin, share
from awareness_vllm.evaluate.evaluate import sample_evenly
from awareness_vllm.evaluate.flops import Prefill, map_flop, plan_cost, plan_flop
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.passages.quotes import quote
from awareness_vllm.passages.strategies import DEFAULT
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.wmatrix.certificate import TAIL
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

CONTROLS = ("truncation", "quotes", "bm25")
LOADED: dict[str, dict[str, Any]] = {
    "memory": {"reread": 0, "quote": 0},
    "reread": {"quote": 0},
    "default": {},
}
"""What requests for a loaded memory say, by arm."""
ARMS = ("native", *LOADED, *CONTROLS)
Answer = tuple[bool, float]
"""Whether an answer is right, and the seconds to its first token."""


@dataclass
class Question:
    """A case with its memory's ID and the ids of its plain prompts by arm."""

    case: dict[str, Any]
    memory: str
    prompts: dict[str, list[int]]
    tokens: int
    """Of the expected answer."""
    quoted: int
    """Tokens of the quotes that *default* has."""
    answers: dict[str, Answer] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Costs:
    """The operations of the default plan, and what they buy."""

    def __init__(self, target: Path, wmatrix: WMatrix) -> None:
        self.prefill = Prefill.of(load_model(target), geometry_of(target))
        self.mapped, self.sink = map_flop(wmatrix), len(wmatrix.manifest.sink)

    def budget(self, tokens: int, native: int) -> int:
        """The tokens that a control reads beside a memory of `tokens`, `native` of them read."""
        flop = plan_flop(self.mapped, self.prefill, tokens, TAIL, native, self.sink)
        return self.prefill.affordable(flop, self.sink, tokens)

    def share(self, tokens: int, native: int) -> float:
        """The default plan's share of reading all `tokens` natively."""
        return plan_cost(self.mapped, self.prefill, tokens, TAIL, native, self.sink)


def questions(
    cases: Sequence[dict[str, Any]], target: Path, wmatrix: WMatrix, store: Path, costs: Costs
) -> list[Question]:
    """The cases, their memories captured into the store."""
    source, tokenizer, vectors = smollm2(), load_tokenizer(str(target)), word_vectors(target)
    model, made = load_model(source), []
    for case in cases:
        text, sink = case["context"], list(wmatrix.manifest.sink)
        tokens = tokenize(tokenizer, text)
        asked = tokenize(tokenizer, case["question"]).ids
        index = PassageIndex.of(text, tokens.spans, 0, vectors=vectors)
        quoted = len(quote_ids(target, index, case))
        budget = costs.budget(len(tokens.ids), quoted)
        contexts = {
            "native": prompt_ids(text, sink, target)[len(sink) :],
            "truncation": tokens.ids[len(tokens.ids) - budget :],
            "quotes": quote_ids(target, index, case, budget, DEFAULT),
            "bm25": quote_ids(target, index, case, budget, "bm25"),
        }
        made.append(
            Question(
                case,
                publish(capture(source, text, model=model), store).stem,
                {arm: [*sink, *ids, *asked] for arm, ids in contexts.items()},
                len(tokenize(tokenizer, case["question"] + case["answer"]).ids) - len(asked),
                quoted,
            )
        )
    return made


def quote_ids(target: Path, index: PassageIndex, case: dict[str, Any], *choice: Any) -> list[int]:
    """The target's ids of a case's passages as a server quotes them, by a `choice` of the index."""
    ranges = map(index.characters, index.choose(case["question"], *choice))
    passages = [case["context"][begin:end] for begin, end in ranges]
    return tokenize(load_tokenizer(str(target)), quote(passages)).ids


class Client:
    """A client that asks one question at a time."""

    def __init__(self, url: str) -> None:
        self.http, self.salts = httpx.Client(base_url=url, timeout=300), 0

    def salt(self) -> str:
        self.salts += 1
        return f"salt-{self.salts}"

    def ask(self, question: Question, prompt: str | list[int], **body: Any) -> Answer:
        """The answer to one prompt, streamed."""
        request = {"model": NAME, "prompt": prompt, "temperature": 0, "stream": True}
        request |= {"max_tokens": max(2, question.tokens + 1), **body}
        text, first, began = "", None, time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json=request) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - began
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text.startswith(question.case["answer"]), first or float("nan")

    def measure(self, question: Question) -> None:
        """Every arm of one question."""
        asked, memory = question.case["question"], question.memory
        for arm, ids in question.prompts.items():
            question.answers[arm] = self.ask(question, ids, cache_salt=self.salt())
        for arm, fields in LOADED.items():
            self.http.delete(f"/v1/memories/{memory}").raise_for_status()
            body = {"memory": {"ids": [memory], **fields}}
            salt = self.salt()
            question.answers[arm] = self.ask(question, asked, cache_salt=salt, **body)
        for temperature, again in (("warm", self.salt()), ("hot", salt)):
            question.seconds[temperature] = self.ask(question, asked, cache_salt=again, **body)[1]


def figures(asked: Sequence[Question], cost: float) -> dict[str, Any]:
    """The figures of questions of one length, at their mean cost."""
    exact = {arm: np.array([float(q.answers[arm][0]) for q in asked]) for arm in ARMS}
    native = exact["native"]
    first = {arm: [q.answers[arm][1] for q in asked] for arm in ARMS}
    first |= {f"default, {kept}": [q.seconds[kept] for q in asked] for kept in ("warm", "hot")}
    kinds = sorted({q.case["kind"] for q in asked})
    of_kind = {kind: np.array([q.case["kind"] == kind for q in asked]) for kind in kinds}
    shares: dict[str, Any] = {}
    if native.any():
        shares = {arm: share(exact[arm], native) for arm in ARMS if arm != "native"}
        others = {"the best control": CONTROLS} | {name: (name,) for name in CONTROLS}
        shares["margins"] = {
            name: margin(exact["default"], [exact[arm] for arm in arms], native)
            for name, arms in others.items()
        }
    return {
        "cases": len(asked),
        "quoted": round(statistics.mean(q.quoted for q in asked), 1),
        "cost": round(cost, 4),
        "exact": {arm: round(float(rows.mean()), 4) for arm, rows in exact.items()},
        "of_native": shares,
        "kinds": {
            kind: {arm: round(float(exact[arm][rows].mean()), 4) for arm in ARMS}
            for kind, rows in of_kind.items()
        },
        "first_token_ms": {
            arm: round(1e3 * statistics.median(seconds), 1) for arm, seconds in first.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a table for docs/results.md."""
    lines = [
        "| tokens | cost | native | memory | reread | default | truncation | quotes | bm25 | "
        "margin | first token: native · cold · warm · hot |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tokens, found in results.items():
        exact, ms = found["exact"], found["first_token_ms"]
        best = found["of_native"].get("margins", {}).get("the best control")
        gained = "" if best is None else "{mean:.2f} ({ci_low:.2f} … {ci_high:.2f})".format(**best)
        times = [ms[arm] for arm in ("native", "default", "default, warm", "default, hot")]
        lines.append(
            f"| {tokens} | {found['cost']:.0%} | "
            + " | ".join(f"{exact[arm]:.2f}" for arm in ARMS)
            + f" | {gained} | {' · '.join(f'{time:.0f}' for time in times)} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1000, 2000])
    parser.add_argument("--limit", type=int, help="cases of each length at most")
    parser.add_argument("--wmatrix", type=Path, help="default: the demo's")
    parser.add_argument("--out", type=Path, help="file for the figures")
    args, flags = parser.parse_known_args()
    stop_on_terminate()
    path, (_, target) = args.wmatrix or demo_map(), demo()
    cases = read_cases(held_out_dir() / "needles" / "cases.jsonl")[1::2]
    cases.sort(key=lambda case: str(case["kind"]))  # else a limit may take some kinds only
    by_length = {
        n: sample_evenly([c for c in cases if c["tokens"] == n], args.limit) for n in args.lengths
    }
    wmatrix = load_wmatrix(path)
    costs = Costs(target, wmatrix)
    results: dict[str, Any] = {}
    document: dict[str, Any] = {"lengths": results, "wmatrix": path.name, **machine()}
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        store.mkdir()
        asked = {n: questions(of, target, wmatrix, store, costs) for n, of in by_length.items()}
        flags = [*(flags or FLAGS[:-2]), "--max-model-len", str(2 * max(args.lengths) + 512)]
        flags += ["--store", str(store), "--wmatrix", str(path), *ALIGNED]
        with running(AWARENESS, target, flags, Path(scratch) / "log") as server:
            client = Client(server.url)
            for tokens, some in asked.items():
                for question in some[:1] + some:  # the first one warms the server up
                    client.measure(question)
                cost = statistics.mean(costs.share(q.case["tokens"], q.quoted) for q in some)
                results[str(tokens)] = figures(some, cost)
                print(table({str(tokens): results[str(tokens)]}), file=sys.stderr)
                if args.out:  # each length as it comes: the next one takes many minutes
                    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
