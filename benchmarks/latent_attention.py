"""Causal attention on a map's latent, beside the linear map.

Two blocks with outputs of zero at first: one looks at a window of earlier tokens and adds to the
latent; one looks at all of them and adds to the keys of the target's layers with full attention,
which carry nearly all that the map loses (docs/fidelity-log.md). `map_variants.py` trains them.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from awareness_vllm.fit.examples import Batch
from awareness_vllm.fit.reader import at
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import Rotations
from awareness_vllm.wmatrix.features import state_columns
from awareness_vllm.wmatrix.file import WMatrix

HEADS, HEAD_DIM, WINDOW = 8, 64, 128
ROPE = Positions(scheme="rope", theta=1e4, rotary_dim=HEAD_DIM)


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

    def forward(self, latent: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is added to the latent [M, R] of a batch's rows, and to their `columns` [M, K]."""
        shape = len(batch.lengths), max(batch.lengths)
        index = torch.cat([torch.arange(length) for length in batch.lengths])
        slots = at(index, batch.lengths, shape[1]).to(latent.device)
        rotations = Rotations(index, latent.device)
        with torch.autocast(latent.device.type, torch.bfloat16):
            own = self.window(latent, slots, shape, rotations) * cast(Tensor, self.spread)
            return own, self.full(latent + own, slots, shape, rotations)
