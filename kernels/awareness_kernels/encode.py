"""Encode: a memory's source states and the target's embeddings to the latent, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from awareness_kernels.launch import (
    STILL,
    Config,
    Tuner,
    angles,
    dot_type,
    narrow,
    on_device,
    padded_pairs,
    paired,
    scalar_type,
    tables,
)
from awareness_kernels.reference import EPSILON

CONFIGS = (
    Config(rows=64, columns=128, depth=64, warps=4, stages=3),
    Config(rows=128, columns=128, depth=64, warps=8, stages=3),
    Config(rows=128, columns=256, depth=64, warps=8, stages=3),
)


@triton.jit(do_not_specialize=["tokens", "sink"])
def encode_kernel(
    segments,
    count,
    source,
    masked,
    ids,
    embedding,
    embedding_stride,
    mean,
    scale,
    weight,
    latent,
    tokens,
    rank,
    width,
    embed,
    predecessors,
    sink,
    STATE: tl.constexpr,
    FIELDS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT: tl.constexpr,
    EPS: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of the latent: the states head by head, then the embeddings."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, wanted = row < tokens, column < rank
    place = tl.load(source + row, mask=live, other=0)
    seen = live & (tl.load(masked + row, mask=live, other=1) == 0)
    pair = tl.arange(0, PAIRS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(count):
        field = segments + s * FIELDS
        states = tl.load(field).to(tl.pointer_type(STATE))
        token_stride, dim_stride = tl.load(field + 1), tl.load(field + 2)
        begin, half = tl.load(field + 3), tl.load(field + 4)
        rotated, interleaved = tl.load(field + 5), tl.load(field + 6)
        first, second = paired(pair, rotated, half, interleaved)
        real = pair < half
        used = seen[:, None] & real[None, :]
        at = states + place[:, None] * token_stride
        a = tl.load(at + first[None, :] * dim_stride, mask=used, other=0.0).to(tl.float32)
        b = tl.load(at + second[None, :] * dim_stride, mask=used, other=0.0).to(tl.float32)
        if rotated > 0:
            cos_sin = used & (pair < rotated)[None, :]
            c, d = angles(field + 7, place[:, None] * rotated + pair[None, :], cos_sin)
            norm = c * c + d * d
            a, b = (a * c + b * d) / norm, (b * c - a * d) / norm
        one, two = begin + first, begin + second
        middle = tl.load(mean + one, mask=real, other=0.0)
        unit = tl.load(scale + one, mask=real, other=0.0)
        a = tl.where(used, (a - middle[None, :]) * unit[None, :], 0.0)
        middle = tl.load(mean + two, mask=real, other=0.0)
        unit = tl.load(scale + two, mask=real, other=0.0)
        b = tl.where(used, (b - middle[None, :]) * unit[None, :], 0.0)
        there = real[:, None] & wanted[None, :]
        w = tl.load(weight + one[:, None] * rank + column[None, :], mask=there, other=0.0)
        total = tl.dot(narrow(a, w.dtype).to(DOT), w.to(DOT), total, input_precision="ieee")
        w = tl.load(weight + two[:, None] * rank + column[None, :], mask=there, other=0.0)
        total = tl.dot(narrow(b, w.dtype).to(DOT), w.to(DOT), total, input_precision="ieee")
    for j in range(predecessors + 1):
        at = row + sink - j
        known = live & (at >= 0)
        token = tl.load(ids + at, mask=known, other=0)
        squares = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, embed, DEPTH):
            dim = begin + tl.arange(0, DEPTH)
            e = tl.load(
                embedding + token[:, None] * embedding_stride + dim[None, :],
                mask=known[:, None] & (dim < embed)[None, :],
                other=0.0,
            ).to(tl.float32)
            squares += tl.sum(e * e, axis=1)
        norm = tl.rsqrt(squares / embed + EPS)
        for begin in range(0, embed, DEPTH):
            dim = begin + tl.arange(0, DEPTH)
            real = dim < embed
            e = tl.load(
                embedding + token[:, None] * embedding_stride + dim[None, :],
                mask=known[:, None] & real[None, :],
                other=0.0,
            ).to(tl.float32)
            feature = width + j * embed + dim
            middle = tl.load(mean + feature, mask=real, other=0.0)
            unit = tl.load(scale + feature, mask=real, other=0.0)
            e = (e * norm[:, None] - middle[None, :]) * unit[None, :]
            e = tl.where(live[:, None] & real[None, :], e, 0.0)
            w = tl.load(
                weight + feature[:, None] * rank + column[None, :],
                mask=real[:, None] & wanted[None, :],
                other=0.0,
            )
            total = tl.dot(narrow(e, w.dtype).to(DOT), w.to(DOT), total, input_precision="ieee")
    tl.store(
        latent + row[:, None] * rank + column[None, :],
        narrow(total, latent.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )


tuner = Tuner(CONFIGS)


def encode_states(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    source: Tensor,
    masked: Tensor,
    ids: Tensor,
    embedding: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    predecessors: int,
    sink: int,
) -> Tensor:
    """`reference.encode_states` in one launch; see there for arguments and result."""
    tokens, rank = len(source), weight.shape[1]
    latent = torch.empty(tokens, rank, dtype=weight.dtype, device=weight.device)
    rows, width = segments(keys, values, cos, sin, interleaved)
    table = on_device(rows, weight.device)

    def launch(config: Config) -> None:
        grid = (triton.cdiv(tokens, config.rows), triton.cdiv(rank, config.columns))
        encode_kernel[grid](
            table,
            len(rows),
            source,
            masked,
            ids,
            embedding,
            embedding.stride(0),
            mean,
            scale,
            weight,
            latent,
            tokens,
            rank,
            width,
            embedding.shape[1],
            predecessors,
            sink,
            STATE=scalar_type(keys[0].dtype),
            FIELDS=table.shape[1],
            PAIRS=padded_pairs((*keys, *values)),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            DOT=dot_type(weight.dtype),
            EPS=EPSILON,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    if latent.numel():
        launch(tuner.best((width, rank), launch))
    return latent


def segments(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
) -> tuple[list[list[int]], int]:
    """For each head, keys first: where it lies, which features it is, how it was turned; and the
    number of features."""
    rows: list[list[int]] = []
    begin = 0
    for states, cos_sin in ((keys, tables(cos, sin, interleaved)), (values, [STILL] * len(values))):
        for state, turn in zip(states, cos_sin, strict=True):
            heads, dims = state.shape[1:]
            place, apart = state.data_ptr(), state.stride(1) * state.element_size()
            strides = (state.stride(0), state.stride(2))
            for head in range(heads):
                first = begin + head * dims
                rows.append([place + head * apart, *strides, first, dims // 2, *turn])
            begin += heads * dims
    return rows, begin
