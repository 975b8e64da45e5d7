"""The agreement of genuine, foreign and invented states with the target's own: what a canary sees.

    python benchmarks/agreement.py --source DIR --target DIR --wmatrix FILE --texts FOLDER

Of each text the source's states are taken as they are, of another text, in another order, and at
random with the same spread; each goes through the map, and the keys of its first tokens are
compared with those that the target computes. Prints the agreements, as shares of the square root of
the map's R² of keys, in one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from awareness_vllm.align.agreement import MAPPED, TOKENS, agreement
from awareness_vllm.align.realign import realign
from awareness_vllm.anchors.corpus import load as load_texts
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import load

CHARACTERS = 1500
ODD = {
    "code": "def f(x):\n    return {k: v for k, v in x.items() if v is not None}\n\n" * 25,
    "han and kana": "日本語の文章と中文句子。" * 15,
    "other scripts": "Ελληνικά и русский; עברית. " * 15,
    "digits": " ".join(str(n * 7919 % 100_003) for n in range(300)),
    "one sentence": "the cat sat. " * 120,
    "blanks": "\n\n\t  {}[]();;" * 100,
    "hexadecimal": "".join(f"{n * 2654435761 % 2**32:08x}" for n in range(200)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12, help="texts of the folder")
    args = parser.parse_args()
    documents = load_texts([args.texts])
    documents = random.Random(0).sample(documents, min(args.limit, len(documents)))
    texts = {document.name: document.text for document in documents} | ODD
    source, target, wmatrix = load_model(args.source), load_model(args.target), load(args.wmatrix)
    embedding = target.get_input_embeddings()
    packages = [capture(args.source, text[:CHARACTERS], model=source) for text in texts.values()]
    reach, shares = wmatrix.manifest.r2["keys"] ** 0.5, defaultdict(list)
    for i, package in enumerate(packages):
        other = packages[(i + 1) % len(packages)]
        for name, forged in variants(package, other).items():
            memory = realign(
                forged,
                wmatrix,
                args.target,
                lambda ids: embedding(ids).float(),
                dtype=torch.float32,
            )
            sink = len(wmatrix.manifest.sink)
            ids = memory.ids[: sink + TOKENS]
            own, _ = states(target, ids)
            keys = [key[sink : len(ids)] for key in memory.keys]
            shares[name].append(agreement(keys, [key[sink:] for key in own]) / reach)
    report = {
        "texts": len(texts),
        "least share": MAPPED,
        "shares": {
            name: {"least": min(all_), "median": sorted(all_)[len(all_) // 2], "most": max(all_)}
            for name, all_ in shares.items()
        },
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(report, indent=2))


def variants(package: Package, other: Package) -> dict[str, Package]:
    """A package, and the same with states that are not its text's."""
    count, generator = len(package.tokens), torch.Generator().manual_seed(0)
    order = torch.cat((torch.zeros(1).long(), 1 + torch.randperm(count - 1, generator=generator)))

    def noise(state: Tensor) -> Tensor:
        return (torch.randn(state.shape, generator=generator) * state.float().std()).to(state.dtype)

    found = {
        "genuine": package,
        "shuffled": with_states(package, lambda state: state[order]),
        "random": with_states(package, noise),
    }
    if len(other.tokens) >= count:
        keys, values = ([state[:count] for state in part] for part in (other.keys, other.values))
        found["another text's"] = replace(package, keys=keys, values=values)
    return found


def with_states(package: Package, change: Callable[[Tensor], Tensor]) -> Package:
    """A package with each layer's states changed."""
    keys, values = (list(map(change, part)) for part in (package.keys, package.values))
    return replace(package, keys=keys, values=values)


if __name__ == "__main__":
    main()
