"""What the answers prefer: which passages are re-read, how many tokens of them, and quotes beside.

    python benchmarks/reread_cases.py --source S --target T --wmatrix pair.wmatrix --each 6

Exact match on the first `--each` cases of even index of every kind and length (of odd index with
`--half odd`): native, the memory alone, and for each `--choice STRATEGY:TOKENS` the passages
re-read in place and quoted alone; those of the first one also quoted after the memory, and re-read
and then quoted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awareness_demo.anchors import held_out_dir
from awareness_demo.needles import KINDS
from tqdm import tqdm

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.align.reread import reread
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.passages import BUDGET
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.passages.quotes import quote
from awareness_vllm.passages.strategies import DEFAULT
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.wmatrix.file import load as load_wmatrix

Case = dict[str, Any]


def select(cases: Sequence[Case], half: int, lengths: Sequence[int], each: int) -> list[Case]:
    """The first `each` cases of a half of each kind and length, by length."""
    own = cases[half::2]
    cells = [[c for c in own if (c["kind"], c["tokens"]) == (k, n)] for n in lengths for k in KINDS]
    return [case for cell in cells for case in cell[:each]]


def is_exact(harness: EvalHarness, memory: AlignedMemory, text: str, answer: str) -> bool:
    """Whether the target's most likely tokens after a memory and a text are the answer."""
    tokens = tokenize(load_tokenizer(str(harness.target)), text + answer)
    scored = int((tokens.spans[:, 1] > len(text.encode())).sum())
    logprobs = harness.logprobs(memory, tokens.ids, scored)
    return logprobs.argmax(-1).tolist() == tokens.ids[-scored:]


def arms(
    harness: EvalHarness, case: Case, index: PassageIndex, choices: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, bool, int]]:
    """The arms of one case: name, whether it is exact, and the tokens read natively for it."""
    context, question, answer = case["context"], case["question"], case["answer"]
    ids = harness.ids(context)
    yield "native", is_exact(harness, harness.native(ids), question, answer), len(ids)
    memory, none = harness.memory(harness.package(context)), harness.native(ids[: harness.sink()])
    yield "memory", is_exact(harness, memory, question, answer), 0
    for strategy, budget in choices:
        spans = index.choose(question, budget, strategy)
        size = sum(end - begin for begin, end in spans)
        quoted = quote([context[slice(*index.characters(span))] for span in spans])
        native = reread(harness.target_model, memory, spans)
        ways = [
            ("reread", native, question, size),
            ("quotes", none, quoted + question, size),
            ("memory+quotes", memory, quoted + question, size),
            ("reread+quotes", native, quoted + question, 2 * size),
        ]
        for way, states, text, read in ways if (strategy, budget) == choices[0] else ways[:2]:
            yield f"{way} {strategy}:{budget}", is_exact(harness, states, text, answer), read


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Exact matches of each arm by kind and length."""
    harness = EvalHarness(args.source, args.target, load_wmatrix(args.wmatrix))
    tokenizer, vectors = load_tokenizer(str(harness.target)), word_vectors(harness.target)
    cases = [json.loads(line) for line in args.cases.read_text().splitlines()]
    cases = select(cases, args.half == "odd", args.lengths, args.each)
    choices = [(name, int(budget)) for name, budget in (c.rsplit(":", 1) for c in args.choice)]
    rows: dict[str, list[tuple[bool, int]]] = {}
    for case in tqdm(cases):
        spans = tokenize(tokenizer, case["context"]).spans
        index = PassageIndex.of(case["context"], spans, harness.sink(), vectors=vectors)
        for name, exact, size in arms(harness, case, index, choices):
            rows.setdefault(name, []).append((exact, size))
    kinds, lengths = (np.array([c[field] for c in cases]) for field in ("kind", "tokens"))
    return {
        "wmatrix": args.wmatrix.name,
        "half": args.half,
        "cases": len(cases),
        "arms": {
            name: {
                "exact": round(float(np.mean([exact for exact, _ in row])), 4),
                "native_tokens": round(float(np.mean([size for _, size in row])), 1),
                "by_kind": {k: _mean(row, kinds == k) for k in KINDS},
                "by_length": {n: _mean(row, lengths == n) for n in args.lengths},
            }
            for name, row in rows.items()
        },
    }


def _mean(row: Sequence[tuple[bool, int]], rows: np.ndarray) -> float:
    return round(float(np.mean([exact for exact, _ in row], where=rows)), 4)


def show(figures: dict[str, Any]) -> None:
    """A line for each arm."""
    for name, arm in figures["arms"].items():
        cells = {**arm["by_length"], **arm["by_kind"]}
        parts = "  ".join(f"{cell} {share:.2f}" for cell, share in cells.items())
        print(f"{name:40}{arm['exact']:.3f}  {arm['native_tokens']:6.1f} tokens   {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--target", required=True, type=Path)
    parser.add_argument("--wmatrix", required=True, type=Path)
    parser.add_argument("--cases", type=Path, default=held_out_dir() / "needles" / "cases.jsonl")
    parser.add_argument("--each", type=int, default=6)
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--half", choices=("even", "odd"), default="even")
    parser.add_argument("--choice", nargs="+", default=[f"{DEFAULT}:{BUDGET}"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    figures = run(args)
    show(figures)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
