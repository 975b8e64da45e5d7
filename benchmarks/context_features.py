"""What a token's context adds to a map, by ridge regression: whether attention could help it.

    python benchmarks/context_features.py --source S --target T --wmatrix W [--tokens 40000]

A map makes a token's states of that token's features alone. Here its latent stands beside causal
means of the latents before it (weights that fall to 1/e over 8, 64 and 512 tokens), what any
attention of the map could gather at its plainest. Printed: the share of the target's variance that
each explains in texts left out of the regression, for the keys of layers with full attention, of
those with a window, and for values.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from awareness_demo.anchors import install
from torch import Tensor

from awareness_vllm.anchors.corpus import load
from awareness_vllm.files import anchors_dir
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.texts import shuffled_windows
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.features import state_columns
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

REACH = (8, 64, 512)
"""Tokens over which the weights of a causal mean fall to 1/e."""
HELD_OUT = 5
"""Every so many texts are left out of the regression."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the features' mean variance, for the latent and for what stands beside it; each
regression takes the two that serve it best."""
SEED = 11


def causal_mean(rows: Tensor, reach: float) -> Tensor:
    """Means [T, R] of the rows before each, those nearer weighing more; the first one's are 0."""
    keep, state = float(torch.tensor(-1 / reach).exp()), torch.zeros_like(rows[0])
    means = torch.zeros_like(rows)
    for at, row in enumerate(rows[:-1]):
        state = keep * state + (1 - keep) * row
        means[at + 1] = state
    return means


def texts(reader: Reader, wmatrix: WMatrix, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Latents [T, R], their contexts [T, 3 R] and states [T, O] of texts, `count` rows in all."""
    done = 0
    for text in shuffled_windows(load([anchors_dir()]), SEED):
        x, y = reader.pairs([reader.tokeniser.text(text)])
        latent = ((x - wmatrix.mean) * wmatrix.scale) @ wmatrix.encode.float()
        yield latent, torch.cat([causal_mean(latent, reach) for reach in REACH], 1), y
        if (done := done + len(x)) >= count:
            return


class Regression:
    """Sums of a ridge regression of states on features, and those of rows left out of it."""

    def __init__(self) -> None:
        self.sums: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, x: Tensor, y: Tensor, *, held_out: bool) -> None:
        """Add rows [T, F] and [T, O]."""
        x = torch.cat((x, torch.ones(len(x), 1)), 1)
        new = (x.T @ x, x.T @ y, torch.stack((y.sum(0), y.square().sum(0), len(y) + 0 * y[0])))
        old = self.sums.get(held_out)
        self.sums[held_out] = new if old is None else tuple(map(torch.add, old, new))  # type: ignore[assignment]

    def explained(self, columns: Mapping[str, Tensor], rank: int) -> dict[str, float]:
        """The share of variance that is explained of some columns of what was held out; the first
        `rank` features are the latent."""
        (gram, cross, _), (others, wanted, about) = self.sums[False], self.sums[True]
        best: dict[str, float] = {}
        beside = RIDGES if len(gram) > rank + 1 else RIDGES[:1]
        for own_ridge, ridge in itertools.product(RIDGES, beside):
            penalty = torch.full((len(gram),), ridge)
            penalty[:rank] = own_ridge
            penalty *= gram.diagonal()[:-1].mean()
            penalty[-1] = 0
            weights = torch.linalg.solve(gram + penalty.diag(), cross)
            total = about[1] - about[0].square() / about[2]
            lost = about[1] - 2 * (weights * wanted).sum(0) + (weights * (others @ weights)).sum(0)
            for name, own in columns.items():
                share = 1 - float(lost[own].sum() / total[own].sum())
                best[name] = max(share, best.get(name, share))
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40_000)
    args = parser.parse_args()
    install()
    wmatrix, reader = load_wmatrix(args.wmatrix), Reader(args.source, args.target, 3)
    reader.choose(tuple(wmatrix.manifest.layers))
    target = wmatrix.manifest.target
    groups = {
        "keys, full attention": [i for i, one in enumerate(target.layers) if one.window is None],
        "keys, windowed": [i for i, one in enumerate(target.layers) if one.window is not None],
    }
    columns = {name: state_columns(target, layers) for name, layers in groups.items()}
    columns = {name: own[own < target.key_width] for name, own in columns.items()}
    columns["values"] = torch.arange(target.key_width, target.width)
    alone, beside = Regression(), Regression()
    for number, (latent, context, y) in enumerate(texts(reader, wmatrix, args.tokens)):
        held_out = number % HELD_OUT == 0
        alone.add(latent, y, held_out=held_out)
        beside.add(torch.cat((latent, context), 1), y, held_out=held_out)
    rank = wmatrix.manifest.rank
    found = {"latent": alone.explained(columns, rank)}
    found["latent and context"] = beside.explained(columns, rank)
    about = {"tokens": args.tokens, "hardware": hardware(), "versions": versions()}
    print(json.dumps({"explained": found, **about}))


if __name__ == "__main__":
    main()
