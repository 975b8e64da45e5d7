"""Causal attention on the latent, trained through the target beside the linear map.

Two blocks with outputs of zero at first: one looks at a window of earlier tokens and adds to the
latent; one looks at all of them and adds to the keys of the target's layers with full attention,
which carry nearly all that the map loses (docs/fidelity-log.md). `gpu_fit.py` runs it: the linear
map alone and with the blocks, each for half of the time, on the same lessons from the same start.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from awareness_vllm.anchors.corpus import load, split
from awareness_vllm.fit.calibrate import PARTS, SHARES, mean_divergence, schedule
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.examples import Batch, CalibrationExamples
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader, at
from awareness_vllm.fit.texts import LongLessons
from awareness_vllm.fit.tokens import Workers
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import Rotations
from awareness_vllm.wmatrix.features import state_columns
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

HEADS, HEAD_DIM, WINDOW = 8, 64, 128
ROPE = Positions(scheme="rope", theta=1e4, rotary_dim=HEAD_DIM)
RATE = 1e-3
"""Adam's rate for the blocks; the linear parts' is a third of the calibration's, relative."""
SEED = 7
"""Of the lessons; the calibration before has others."""


class Block(nn.Module):
    """Causal attention over the rows of memories, within `window` rows or over all before; its
    output is 0 at first."""

    def __init__(self, width: int, outputs: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, outputs, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(
        self, latent: Tensor, slots: Tensor, shape: tuple[int, int], rotations: Rotations
    ) -> Tensor:
        """What is added for each row [M, outputs], of the latent [M, R]; `slots` [M] are its rows
        in a batch of the `shape` (memories, rows)."""
        q, k, v = self.qkv(self.norm(latent)).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        q, k = (rotations.rotate(x, ROPE).to(v.dtype) for x in (q, k))
        padded = []
        for x in (q, k, v):
            whole = x.new_zeros(math.prod(shape), HEADS, HEAD_DIM).index_copy(0, slots, x)
            padded.append(whole.unflatten(0, shape).transpose(1, 2))
        mask = None
        if self.window is not None:
            at_row = torch.arange(shape[1], device=latent.device)
            distance = at_row[:, None] - at_row
            mask = (distance >= 0) & (distance < self.window)
        mixed = nn.functional.scaled_dot_product_attention(
            *padded, attn_mask=mask, is_causal=mask is None
        )
        return self.out(mixed.transpose(1, 2).flatten(0, 1).flatten(1)[slots])


class Blocks(nn.Module):
    """The windowed block on the latent, and the full one on the keys of layers without a window."""

    def __init__(self, wmatrix: WMatrix) -> None:
        super().__init__()
        target, rank = wmatrix.manifest.target, wmatrix.manifest.rank
        full = [i for i, layer in enumerate(target.layers) if layer.window is None]
        columns = state_columns(target, full)
        self.register_buffer("columns", columns[columns < target.key_width])
        self.window = Block(rank, rank, WINDOW)
        self.full = Block(rank, len(self.columns), None)
        # Latents have no unit; so that a step is as large in any, they get one.
        self.register_buffer("spread", wmatrix.encode.float().norm(dim=0).mean())


def mapped(
    wmatrix: WMatrix,
    reader: Reader,
    parts: dict[str, Tensor],
    blocks: Blocks | None,
    batch: Batch,
) -> Tensor:
    """`mapped_logits` of the map with blocks on its latent."""
    dtype = batch.features.dtype
    encode, decode, bias = (parts[name].to(dtype) for name in PARTS)
    latent = batch.features @ encode
    extra = None
    if blocks is not None:
        shape = len(batch.lengths), max(batch.lengths)
        index = torch.cat([torch.arange(length) for length in batch.lengths])
        slots = at(index, batch.lengths, shape[1]).to(latent.device)
        rotations = Rotations(index, latent.device)
        with torch.autocast(latent.device.type, torch.bfloat16):
            latent = latent + (blocks.window(latent, slots, shape, rotations) * blocks.spread)
            extra = blocks.full(latent, slots, shape, rotations)
        latent = latent.to(dtype)
    flat = latent @ decode + bias
    if extra is not None:
        flat = flat.index_add(1, blocks.columns, extra.to(flat.dtype))
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    return logits_after(
        reader, sinks, flat, batch.lengths, batch.ids, reread=batch.reread, tokens=batch.tokens
    )


def train(
    examples: CalibrationExamples,
    blocks: Blocks | None,
    minutes: float,
    rate: float,
    say: Callable[[str], None],
) -> Callable[[Batch], Tensor]:
    """Train the map, and blocks where there are some, for so many minutes; the map of batches."""
    reader, wmatrix = examples.reader, examples.wmatrix
    parts = {name: getattr(wmatrix, name).float().clone().requires_grad_() for name in PARTS}
    groups: list[dict[str, Any]] = [
        {"params": [part], "full": rate / 3 * getattr(wmatrix, name).float().std().item() * share}
        for (name, part), share in zip(parts.items(), SHARES, strict=True)
    ]
    if blocks is not None:
        groups.append({"params": list(blocks.parameters()), "full": RATE})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    logits = functools.partial(mapped, wmatrix, reader, parts, blocks)
    losses: list[Tensor] = []
    begun = time.monotonic()
    for step, batch in enumerate(examples.batches(count())):
        begun = begun if step else time.monotonic()
        share = (time.monotonic() - begun) / (60 * minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * schedule(step, share)
        optimizer.zero_grad()
        loss = mean_divergence(logits(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 100 == 0:
            mean = torch.stack(losses[-100:]).mean().item()
            say(f"step {step}, {share:.0%}: KL {mean:.4f}")
    say(f"{len(losses)} steps: KL {torch.stack(losses[-200:]).mean().item():.4f} of the last 200")
    return logits


def compare(
    args: argparse.Namespace,
    name: str,
    minutes: float,
    judge: Callable[[Reader, WMatrix, Callable[[Batch], Tensor]], dict[str, Any]],
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of the linear map alone and with blocks, each trained for half of the minutes."""
    source, target = (args.models / part for part in name.split("-to-"))
    reader = Reader(source, target, 3, device=FitConfig(device=args.device).resolved().device)
    saved = [args.out / f"{name}{suffix}.wmatrix" for suffix in ("", ".regression")]
    wmatrix = load_wmatrix(next(path for path in saved if path.exists()))
    lessons = LongLessons.of(split(load([args.anchors]), FitConfig().held_out, 0)[0], SEED)
    with Workers(args.workers, (reader.tokeniser, lessons)) as workers:
        for variant in ("linear", "attention"):
            torch.manual_seed(0)
            examples = CalibrationExamples(
                reader, wmatrix, lessons, None, args.batch, workers=workers
            )
            blocks = None if variant == "linear" else Blocks(wmatrix).to(reader.device)
            logits = train(examples, blocks, minutes / 2, args.rate, say)
            if blocks is not None:
                tensors = {n: t.bfloat16().contiguous() for n, t in blocks.state_dict().items()}
                save_file(tensors, args.out / "latent_attention.safetensors")
            yield variant, judge(reader, wmatrix, logits)
