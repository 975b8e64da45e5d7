"""Encode: source states and embeddings are packed as features, block by block of rows, by kernels
that memory bounds, and multiplied by cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from awareness_kernels.blocks import block_rows
from awareness_kernels.launch import (
    WARPS,
    Head,
    Tables,
    Turn,
    aligned,
    angles,
    load_pairs,
    load_rest,
    narrow,
    pointer,
    scalar_type,
    shortest,
    store_pairs,
    store_rest,
    turns,
    upload,
)
from awareness_kernels.reference import EPSILON

TOKENS, DEPTH = 8, 512
"""A tile of embeddings: rows, and dims of a step."""


@triton.jit(do_not_specialize=["rows", "held"])
def pack_states_kernel(
    table, source, masked, mean, scale, packed, features, rows, held,
    STATE: tl.constexpr, FIELDS: tl.constexpr, DIMS: tl.constexpr, ROTATED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, WOVEN: tl.constexpr,
    ALIGN: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One layer's keys or values of ROWS tokens, positions off, standardised: all heads, so that
    the angles are read once. A row that is masked, or reads none of the `held` tokens, is 0."""
    field = table + tl.program_id(1) * FIELDS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    place = tl.load(source + row, mask=live, other=-1)
    seen = (place >= 0) & (place < held) & (tl.load(masked + row, mask=live, other=1) == 0)
    live, seen, place = live[:, None], seen[:, None], place[:, None]
    states = pointer(field, STATE, ALIGN) + place * aligned(field + 1, ALIGN)
    apart = aligned(field + 2, ALIGN)
    stride = 1 if DENSE else tl.load(field + 3)
    heads, feature = tl.load(field + 4), aligned(field + 5, ALIGN)
    TYPE: tl.constexpr = packed.dtype.element_ty
    out = packed + row[:, None].to(tl.int64) * features
    one = tl.zeros((1, 1), tl.int64)
    all_ = one == 0
    if ROTATED > 0:
        cos, sin = angles(field + 6, place, seen, ROTATED, PAIRS, ALIGN)
        norm = 1.0 / (cos * cos + sin * sin)
        cos, sin = cos * norm, sin * norm
    for head in range(heads):
        at = states + head * apart
        begin = feature + head * DIMS
        if ROTATED > 0:
            a, b = load_pairs(at, stride, seen, ROTATED, PAIRS, WOVEN)
            a, b = a * cos + b * sin, b * cos - a * sin
            c, d = load_pairs(mean + begin + one, 1, all_, ROTATED, PAIRS, WOVEN)
            e, f = load_pairs(scale + begin + one, 1, all_, ROTATED, PAIRS, WOVEN)
            a, b = tl.where(seen, (a - c) * e, 0.0), tl.where(seen, (b - d) * f, 0.0)
            store_pairs(out + begin, 1, a, b, live, TYPE, ROTATED, PAIRS, WOVEN)
        if REST > 0:
            x = load_rest(at, stride, seen, ROTATED, REST, WIDTH)
            middle = load_rest(mean + begin + one, 1, all_, ROTATED, REST, WIDTH)
            unit = load_rest(scale + begin + one, 1, all_, ROTATED, REST, WIDTH)
            x = tl.where(seen, (x - middle) * unit, 0.0)
            store_rest(out + begin, 1, x, live, TYPE, ROTATED, REST, WIDTH)


@triton.jit(do_not_specialize=["first", "rows", "vocabulary"])
def pack_embeddings_kernel(
    ids, embedding, stride, mean, scale, packed, features, begin, embed, first, rows, vocabulary,
    PREDECESSORS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The normalised embeddings of TOKENS tokens, each read once and written to its own row and to
    those that it precedes. Row 0 reads the id at `first`; before the first id stand zeros."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS) - PREDECESSORS
    there = (row < rows) & (row + first >= 0)
    token = tl.load(ids + first + row, mask=there, other=-1)
    known = ((token >= 0) & (token < vocabulary))[:, None]
    at = embedding + token[:, None] * stride
    squares = tl.zeros((TOKENS, 1), tl.float32)
    for start in range(0, embed, DEPTH):
        dim = start + tl.arange(0, DEPTH)[None, :]
        e = tl.load(at + dim, mask=known & (dim < embed), other=0.0).to(tl.float32)
        squares += tl.sum(e * e, axis=1, keep_dims=True)
    norm = tl.rsqrt(squares / embed + EPS)
    TYPE: tl.constexpr = packed.dtype.element_ty
    for start in range(0, embed, DEPTH):
        dim = start + tl.arange(0, DEPTH)[None, :]
        real = dim < embed
        e = tl.load(at + dim, mask=known & real, other=0.0).to(tl.float32) * norm
        for j in range(PREDECESSORS + 1):
            feature = begin + j * embed + dim
            middle = tl.load(mean + feature, mask=real, other=0.0)
            unit = tl.load(scale + feature, mask=real, other=0.0)
            to = (row + j)[:, None].to(tl.int64)
            live = (to >= 0) & (to < rows) & real
            tl.store(packed + to * features + feature, narrow((e - middle) * unit, TYPE), mask=live)


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
    """`reference.encode_states` by pack and product; see there for arguments and result."""
    tokens, (features, rank), device = len(source), weight.shape, weight.device
    latent = torch.empty(tokens, rank, dtype=weight.dtype, device=device)
    if not latent.numel():
        return latent
    source, masked, ids = (upload(x, device) for x in (source, masked, ids))
    tables, width = state_tables(keys, values, turns(cos, sin, interleaved), features)
    groups = tables.upload(device)
    held = shortest([keys[0], *cos])
    block = block_rows(features, weight.element_size())
    packed = weight.new_empty(min(block, tokens), features)
    for begin in range(0, tokens, block):
        rows = min(block, tokens - begin)
        part = slice(begin, begin + rows)
        for head, table in groups:
            pack_states(head, table, source[part], masked[part], mean, scale, packed, keys, held)
        if predecessors >= 0:
            first = begin + sink
            pack_embeddings(ids, embedding, mean, scale, packed, rows, first, predecessors, width)
        torch.mm(packed[:rows], weight, out=latent[part])
    return latent


def state_tables(
    keys: Sequence[Tensor], values: Sequence[Tensor], turned: Sequence[Turn], features: int
) -> tuple[Tables, int]:
    """For each layer's keys, then values: where they lie, which features they are, how they were
    rotated; and the number of features."""
    tables, begin = Tables(), 0
    layers = [*zip(keys, turned, strict=True)]
    layers += [(x, turn.still(x.shape[-1])) for x, turn in zip(values, turned, strict=True)]
    for states, turn in layers:
        _, heads, dims = states.shape
        fields = [states.data_ptr(), *states.stride(), heads, begin, turn.cos, turn.sin]
        tables.add([states], turn, (begin, features), fields)
        begin += heads * dims
    return tables, begin


def pack_states(
    head: Head,
    table: Tensor,
    source: Tensor,
    masked: Tensor,
    mean: Tensor,
    scale: Tensor,
    packed: Tensor,
    keys: Sequence[Tensor],
    held: int,
) -> None:
    """Fill in the states of one group of layers for the rows that read `source`."""
    rows = len(source)
    pack_states_kernel[(triton.cdiv(rows, head.rows), len(table))](
        table,
        source,
        masked,
        mean,
        scale,
        packed,
        packed.shape[1],
        rows,
        held,
        STATE=scalar_type(keys[0].dtype),
        FIELDS=table.shape[1],
        ROWS=head.rows,
        **head.constants,
        num_warps=WARPS,
    )


def pack_embeddings(
    ids: Tensor,
    embedding: Tensor,
    mean: Tensor,
    scale: Tensor,
    packed: Tensor,
    rows: int,
    first: int,
    predecessors: int,
    width: int,
) -> None:
    """Fill in the embeddings of rows, the first of which reads the id at `first`."""
    vocabulary, embed = embedding.shape
    pack_embeddings_kernel[(triton.cdiv(rows + predecessors, TOKENS),)](
        ids,
        embedding,
        embedding.stride(0),
        mean,
        scale,
        packed,
        packed.shape[1],
        width,
        embed,
        first,
        rows,
        vocabulary,
        PREDECESSORS=predecessors,
        TOKENS=TOKENS,
        DEPTH=DEPTH,
        EPS=EPSILON,
        num_warps=WARPS,
    )
