"""Retention of several memories in one prompt, each captured alone, beside one of the same text.

    python benchmarks/several.py --source S --target T --wmatrix FILE --texts DIR --limit 24

A context is split into 1, 2 and 4 memories at successive positions; retention is that of the text
after them, against the target reading the whole context. Without --wmatrix source and target are
one model: the loss is then that of reading the parts separately.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.anchors.corpus import load
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import EvalHarness, token_nll
from awareness_vllm.evaluate.evaluate import join_documents, take_excerpts
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rerotate
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import load as load_wmatrix

COUNTS = (1, 2, 4)


def parts_of(harness: EvalHarness, text: str, count: int) -> list[str]:
    """A text in `count` parts of equally many target tokens."""
    ends = tokenize(load_tokenizer(str(harness.target)), text).spans[:, 1]
    cuts = [
        0,
        *(int(ends[len(ends) * i // count - 1]) for i in range(1, count)),
        len(text.encode()),
    ]
    raw = text.encode()
    return [raw[a:b].decode(errors="ignore") for a, b in itertools.pairwise(cuts)]


def concatenate(memories: list[AlignedMemory], skip: int, target: Geometry) -> AlignedMemory:
    """Memories one after another: all but the first lose their sink, as in the server."""
    ids, keys, values = list(memories[0].ids), [memories[0].keys], [memories[0].values]
    for memory in memories[1:]:
        offset = len(ids) - skip
        keys.append(
            [
                rerotate(key[skip:], offset, layer.positions).to(key.dtype)
                for key, layer in zip(memory.keys, target.layers, strict=True)
            ]
        )
        values.append([value[skip:] for value in memory.values])
        ids += memory.ids[skip:]
    both = ([torch.cat(layer) for layer in zip(*part, strict=True)] for part in (keys, values))
    return AlignedMemory(ids, *both)


def measure(harness: EvalHarness, args: argparse.Namespace) -> dict[str, Any]:
    """Retention with the context in 1, 2 and 4 memories."""
    target, skip = geometry_of(harness.target), harness.sink()
    long = join_documents(load([Path(p) for p in args.texts]), args.context + args.continuation)
    token_nlls: dict[str, list[float]] = {}
    cuts = take_excerpts(harness, long, args.context, args.continuation, args.limit)
    for _, text, ids in tqdm(cuts, desc="several"):
        whole = harness.ids(text)
        conditions = {"native": harness.native(whole), "none": harness.native(whole[: skip or 1])}
        for count in COUNTS:
            memories = [
                harness.memory(harness.package(part)) for part in parts_of(harness, text, count)
            ]
            conditions[f"{count}"] = concatenate(memories, skip, target)
        for condition, memory in conditions.items():
            logprobs = harness.logprobs(memory, ids, args.continuation)
            token_nlls.setdefault(condition, []).append(token_nll(logprobs, ids).mean().item())
    nll = {condition: np.array(values) for condition, values in token_nlls.items()}
    return {
        "n": len(cuts),
        "nll": {condition: float(values.mean()) for condition, values in nll.items()},
        "retention": {
            count: retention(nll["native"], nll[f"{count}"], nll["none"]) for count in COUNTS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--wmatrix")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--continuation", type=int, default=60)
    args = parser.parse_args()
    wmatrix = load_wmatrix(args.wmatrix) if args.wmatrix else None
    values = measure(EvalHarness(Path(args.source), Path(args.target), wmatrix), args)
    print(json.dumps({**values, "hardware": hardware(), "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
