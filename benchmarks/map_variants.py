"""The linear map and variants of it, trained through the target in lockstep from one start.

    python benchmarks/map_variants.py --source S --target T --wmatrix W --minutes 45 --out FILE

- `linear`: the map as it is, trained on; the others' control.
- `attention`: blocks of attention on its latent (`latent_attention.py`).
- `layer-input`: it predicts the input of each of the target's layers, after that layer's own norm;
  the target's own projections, and its key norm, make keys and values of it (SCD).
- `slots`: rows of the cache after every memory, the same after each, learned (KV Packet).

Each step's lessons are read once for all, so that variants differ in nothing else. Figures are on
held-out texts and on the needles of even index: good for choosing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from awareness_demo.anchors import held_out_dir
from held_out_figures import evaluate
from latent_attention import Blocks
from torch import Tensor, nn

from awareness_vllm.anchors.corpus import load, split
from awareness_vllm.files import anchors_dir, atomic_write
from awareness_vllm.fit.calibrate import PARTS, SHARES, mean_divergence, schedule
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.examples import Batch, CalibrationExamples
from awareness_vllm.fit.memories import Reread, logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.texts import LongLessons
from awareness_vllm.fit.tokens import Workers
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

SLOTS = 8
SEED = 7
"""Of the lessons; the calibration before has others."""


class Linear(nn.Module):
    """The map, its parts in float32.

    Their rates are relative to their spread, a `caution` of the calibration's: they were trained
    before. `new` is Adam's rate for what was not.
    """

    caution, new = 1 / 3, 1e-3

    def __init__(self, reader: Reader, wmatrix: WMatrix) -> None:
        super().__init__()
        self.reader, self.sinks = reader, (wmatrix.sink_keys, wmatrix.sink_values)
        self.encode, self.decode, self.bias = (
            nn.Parameter(getattr(wmatrix, name).float().contiguous()) for name in PARTS
        )

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups, each with its `full` rate: parts by their spread, the rest."""
        linear = [
            {"params": [part], "full": rate * self.caution * part.detach().std().item() * share}
            for part, share in zip((self.encode, self.decode, self.bias), SHARES, strict=True)
        ]
        known = {id(group["params"][0]) for group in linear}
        rest = [part for part in self.parameters() if id(part) not in known]
        return [*linear, {"params": rest, "full": self.new}] if rest else linear

    def states(self, batch: Batch) -> Tensor:
        """The memories' position-free states [M, O]."""
        dtype = batch.features.dtype
        encode, decode, bias = (p.to(dtype) for p in (self.encode, self.decode, self.bias))
        return batch.features @ encode @ decode + bias

    def forward(self, batch: Batch) -> Tensor:
        """`mapped_logits` of a batch."""
        return logits_after(
            self.reader, self.sinks, self.states(batch), batch.lengths, batch.ids,
            reread=batch.reread, tokens=batch.tokens,
        )  # fmt: skip


class Attention(Linear):
    """The map with attention on its latent."""

    def __init__(self, reader: Reader, wmatrix: WMatrix) -> None:
        super().__init__(reader, wmatrix)
        self.blocks = Blocks(wmatrix)

    def states(self, batch: Batch) -> Tensor:
        dtype = batch.features.dtype
        latent = batch.features @ self.encode.to(dtype)
        own, keys = self.blocks(latent, batch)
        flat = (latent + own).to(dtype) @ self.decode.to(dtype) + self.bias.to(dtype)
        return flat.index_add(1, cast(Tensor, self.blocks.columns), keys.to(dtype))


class LayerInput(Linear):
    """The map to the inputs of the target's layers [M, layers * E], from which its own projections
    make keys and values. It begins as the least inputs that give the linear map's states, but their
    keys' norm: that is far from where it can end."""

    caution = 1.0

    def __init__(self, reader: Reader, wmatrix: WMatrix) -> None:
        super().__init__(reader, wmatrix)
        layers = reader.target_model.model.layers  # type: ignore[union-attr]
        self.attentions = [layer.self_attn for layer in layers]  # type: ignore[union-attr]
        both = torch.cat((self.decode.detach(), self.bias.detach()[None]))
        keys, values = split_states(wmatrix.manifest.target, both)
        inputs = []
        for attention, key, value in zip(self.attentions, keys, values, strict=True):
            scale = (1 + attention.k_norm.weight.float()).repeat(key.shape[1])
            weights = attention.k_proj.weight.float(), attention.v_proj.weight.float()
            solver = torch.linalg.pinv(torch.cat((scale[:, None] * weights[0], weights[1])))
            inputs.append(torch.cat((key.flatten(1), value.flatten(1)), 1) @ solver.T)
        whole = torch.cat(inputs, 1)
        self.decode, self.bias = nn.Parameter(whole[:-1].clone()), nn.Parameter(whole[-1].clone())

    def states(self, batch: Batch) -> Tensor:
        inputs = super().states(batch).chunk(len(self.attentions), dim=1)
        keys, values = [], []
        for attention, x in zip(self.attentions, inputs, strict=True):
            key = attention.k_proj(x).unflatten(1, (-1, attention.head_dim))
            keys.append(attention.k_norm(key).flatten(1))
            values.append(attention.v_proj(x))
        return torch.cat((*keys, *values), 1)


class Slots(Linear):
    """The map with learned rows after each memory, which begin as states of no token at all."""

    new = 1e-2

    def __init__(self, reader: Reader, wmatrix: WMatrix) -> None:
        super().__init__(reader, wmatrix)
        self.slots = nn.Parameter(wmatrix.bias.float().repeat(SLOTS, 1))

    def forward(self, batch: Batch) -> Tensor:
        slots, reread = self.slots.to(batch.features.dtype), batch.reread
        pieces = self.states(batch).split(batch.lengths)
        flat = torch.cat([part for piece in pieces for part in (piece, slots)])
        lengths = [length + SLOTS for length in batch.lengths]
        if reread is not None:
            ends = torch.tensor(batch.lengths).cumsum(0).to(reread.rows.device)
            before = torch.searchsorted(ends, reread.rows, right=True)
            reread = Reread(reread.rows + SLOTS * before, reread.states)
        return logits_after(
            self.reader, self.sinks, flat, lengths, batch.ids, reread=reread, tokens=batch.tokens
        )


VARIANTS: dict[str, type[Linear]] = {
    "linear": Linear,
    "attention": Attention,
    "layer-input": LayerInput,
    "slots": Slots,
}


def train(
    examples: CalibrationExamples, variants: Mapping[str, Linear], minutes: float, rate: float
) -> int:
    """Train all variants on the same batches for so many minutes in all; the steps."""
    optimizers = {
        n: torch.optim.Adam(v.groups(rate), betas=(0.9, 0.98)) for n, v in variants.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in variants}
    begun, step = time.monotonic(), 0
    for step, batch in enumerate(examples.batches(count())):
        if (share := (time.monotonic() - begun) / (60 * minutes)) >= 1:
            break
        for name, variant in variants.items():
            for group in optimizers[name].param_groups:
                group["lr"] = group["full"] * schedule(step, share)
            optimizers[name].zero_grad()
            loss = mean_divergence(variant(batch), batch)
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())
        if step % 20 == 0:
            means = {n: round(sum(own[-20:]) / len(own[-20:]), 4) for n, own in losses.items()}
            print(f"step {step}, {share:.0%}: KL {means}", file=sys.stderr, flush=True)
    return step


def compare(
    reader: Reader,
    wmatrix: WMatrix,
    anchors: Path,
    args: argparse.Namespace,
    lengths: Sequence[int],
) -> dict[str, Any]:
    """The figures of all variants after training, and of the map before it, by length."""
    before = Linear(reader, wmatrix)
    torch.manual_seed(0)
    variants = {name: VARIANTS[name](reader, wmatrix).to(reader.device) for name in VARIANTS}
    lessons = LongLessons.of(split(load([anchors]), FitConfig().held_out, 0)[0], SEED)
    with Workers(args.workers, (reader.tokeniser, lessons)) as workers:
        examples = CalibrationExamples(reader, wmatrix, lessons, None, args.batch, workers=workers)
        steps = train(examples, variants, args.minutes, args.rate)
    maps = {"before": before, **variants}
    return {
        "steps": steps,
        "lessons": steps * args.batch,
        **{str(n): evaluate(reader, wmatrix, args.held_out, args.limits, n, maps) for n in lengths},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=(300, 2000))
    parser.add_argument("--limits", type=int, nargs=2, default=(24, 48))
    parser.add_argument("--held-out", type=Path, default=held_out_dir())
    args = parser.parse_args()
    wmatrix = load_wmatrix(args.wmatrix)
    reader = Reader(args.source, args.target, 3)
    reader.choose(tuple(wmatrix.manifest.layers))
    found = compare(reader, wmatrix, anchors_dir(), args, args.lengths)
    with atomic_write(args.out) as draft:
        draft.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
