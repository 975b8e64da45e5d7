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


@triton.jit
def standardised(x, mean, scale, feature, real, used):
    """x [ROWS, N], less the mean and times the scale of each feature [N]; 0 where not used."""
    middle = tl.load(mean + feature, mask=real, other=0.0)
    unit = tl.load(scale + feature, mask=real, other=0.0)
    return tl.where(used, (x - middle[None, :]) * unit[None, :], 0.0)


@triton.jit
def product(total, x, weight, feature, real, rank, column, DOT: tl.constexpr):
    """total [ROWS, COLUMNS] and the product of x [ROWS, N] with the weight of its features [N]."""
    w = tl.load(
        weight + feature[:, None] * rank + column[None, :],
        mask=real[:, None] & (column < rank)[None, :],
        other=0.0,
    )
    return tl.dot(narrow(x, w.dtype).to(DOT), w.to(DOT), total, input_precision="ieee")


@triton.jit
def add_states(
    total, field, mean, scale, weight, place, seen, rank, column,
    STATE: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """total [ROWS, COLUMNS] and what one head's states of the tokens at `place` [ROWS] add."""
    pair = tl.arange(0, PAIRS)
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
    a = standardised(a, mean, scale, one, real, used)
    b = standardised(b, mean, scale, two, real, used)
    total = product(total, a, weight, one, real, rank, column, DOT)
    return product(total, b, weight, two, real, rank, column, DOT)


@triton.jit
def embedded(embedding, stride, token, known, dim, embed):
    """Some dims [DEPTH] of tokens' [ROWS] embeddings in float32; 0 for those not known."""
    mask = known[:, None] & (dim < embed)[None, :]
    return tl.load(embedding + token[:, None] * stride + dim[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def add_embeddings(
    total, embedding, embedding_stride, mean, scale, weight, token, known, live, first_feature,
    embed, rank, column,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """total [ROWS, COLUMNS] and what the normalised embeddings of one token a row [ROWS] add."""
    squares = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, embed, DEPTH):
        dim = begin + tl.arange(0, DEPTH)
        e = embedded(embedding, embedding_stride, token, known, dim, embed)
        squares += tl.sum(e * e, axis=1)
    norm = tl.rsqrt(squares / embed + EPS)
    for begin in range(0, embed, DEPTH):
        dim = begin + tl.arange(0, DEPTH)
        real = dim < embed
        e = embedded(embedding, embedding_stride, token, known, dim, embed)
        used = live[:, None] & real[None, :]
        feature = first_feature + dim
        e = standardised(e * norm[:, None], mean, scale, feature, real, used)
        total = product(total, e, weight, feature, real, rank, column, DOT)
    return total


@triton.jit(do_not_specialize=["tokens", "sink"])
def encode_kernel(
    segments, count, source, masked, ids, embedding, embedding_stride, mean, scale, weight, latent,
    tokens, rank, width, embed, predecessors, sink,
    STATE: tl.constexpr, FIELDS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of the latent: the states head by head, then the embeddings."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = row < tokens
    place = tl.load(source + row, mask=live, other=0)
    seen = live & (tl.load(masked + row, mask=live, other=1) == 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(count):
        total = add_states(
            total, segments + s * FIELDS, mean, scale, weight, place, seen, rank, column,
            STATE, PAIRS, DOT,
        )  # fmt: skip
    for j in range(predecessors + 1):
        at = row + sink - j
        known = live & (at >= 0)
        token = tl.load(ids + at, mask=known, other=0)
        total = add_embeddings(
            total, embedding, embedding_stride, mean, scale, weight, token, known, live,
            width + j * embed, embed, rank, column, ROWS, DEPTH, DOT, EPS,
        )  # fmt: skip
    tl.store(
        latent + row[:, None] * rank + column[None, :],
        narrow(total, latent.dtype.element_ty),
        mask=live[:, None] & (column < rank)[None, :],
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
