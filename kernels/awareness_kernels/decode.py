"""Decode: the latent to keys and values of all target layers, into their pages, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

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
    placed,
    scalar_type,
    tables,
)

CONFIGS = (
    Config(rows=64, columns=0, depth=64, warps=4, stages=3),
    Config(rows=128, columns=0, depth=32, warps=8, stages=3),
    Config(rows=128, columns=0, depth=64, warps=8, stages=3),
)
"""The columns of a tile are one head's."""


@triton.jit
def mapped_states(
    latent, weight, bias, row, mapped, column, first, second, real, rank, outputs,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The first and the second dims [ROWS, PAIRS] of one head's states: the latent of rows [ROWS]
    times the head's columns, and the bias."""
    a = tl.zeros((ROWS, PAIRS), tl.float32)
    b = tl.zeros((ROWS, PAIRS), tl.float32)
    for begin in range(0, rank, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        known = k < rank
        z = tl.load(
            latent + row[:, None] * rank + k[None, :],
            mask=mapped[:, None] & known[None, :],
            other=0.0,
        )
        z = z.to(DOT)
        w = weight + k[:, None] * outputs + column
        there = known[:, None] & real[None, :]
        one = tl.load(w + first[None, :], mask=there, other=0.0).to(DOT)
        two = tl.load(w + second[None, :], mask=there, other=0.0).to(DOT)
        a = tl.dot(z, one, a, input_precision="ieee")
        b = tl.dot(z, two, b, input_precision="ieee")
    a += tl.load(bias + column + first, mask=real, other=0.0)[None, :]
    b += tl.load(bias + column + second, mask=real, other=0.0)[None, :]
    return a, b


@triton.jit(do_not_specialize=["rows", "sink"])
def decode_kernel(
    segments, scales, latent, weight, bias, positions, rows, sink, rank, outputs,
    PAGE: tl.constexpr, SINK: tl.constexpr, FIELDS: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One head's keys or values of ROWS tokens; the first `sink` of all rows are as cached."""
    field = segments + tl.program_id(0) * FIELDS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column, half = tl.load(field), tl.load(field + 1)
    rotated, interleaved = tl.load(field + 2), tl.load(field + 3)
    pair = tl.arange(0, PAIRS)
    real = pair < half
    first, second = paired(pair, rotated, half, interleaved)
    mapped = (row >= sink) & (row < rows)
    a, b = mapped_states(
        latent, weight, bias, row - sink, mapped, column, first, second, real, rank, outputs,
        ROWS, PAIRS, DEPTH, DOT,
    )  # fmt: skip
    if rotated > 0:
        cos_sin = mapped[:, None] & (pair < rotated)[None, :]
        place = tl.load(positions + row, mask=mapped, other=0)
        c, d = angles(field + 4, place[:, None] * rotated + pair[None, :], cos_sin)
        a, b = a * c - b * d, b * c + a * d
    cached = (row < sink)[:, None] & real[None, :]
    own = tl.load(field + 6).to(tl.pointer_type(SINK)) + row[:, None] * tl.load(field + 7)
    a = tl.where(cached, tl.load(own + first[None, :], mask=cached, other=0.0).to(tl.float32), a)
    b = tl.where(cached, tl.load(own + second[None, :], mask=cached, other=0.0).to(tl.float32), b)
    slot_mapping = tl.load(field + 8).to(tl.pointer_type(tl.int64))
    slot = tl.load(slot_mapping + row, mask=row < rows, other=-1)
    page, stride = placed(field + 9, slot, PAGE)
    written = (slot >= 0)[:, None] & real[None, :]
    unit = tl.load(scales + tl.load(field + 14))
    tl.store(page + first[None, :] * stride, narrow(a / unit, PAGE), mask=written)
    tl.store(page + second[None, :] * stride, narrow(b / unit, PAGE), mask=written)


tuner = Tuner(CONFIGS)


def decode_paged(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    sink_keys: Sequence[Tensor],
    sink_values: Sequence[Tensor],
    key_pages: Sequence[Tensor],
    value_pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    scales: Tensor,
) -> None:
    """`reference.decode_paged` in one launch; see there for arguments and result."""
    rows, pages = len(positions), (*key_pages, *value_pages)
    fields = segments(
        [*tables(cos, sin, interleaved), *([STILL] * len(key_pages))],
        (*sink_keys, *sink_values),
        pages,
        (*slot_mapping, *slot_mapping),
    )
    table = on_device(fields, latent.device)

    def launch(config: Config) -> None:
        decode_kernel[(len(fields), triton.cdiv(rows, config.rows))](
            table,
            scales,
            latent,
            weight,
            bias,
            positions,
            rows,
            rows - len(latent),
            latent.shape[1],
            weight.shape[1],
            PAGE=scalar_type(key_pages[0].dtype),
            SINK=scalar_type(sink_keys[0].dtype),
            FIELDS=table.shape[1],
            PAIRS=padded_pairs(pages),
            ROWS=config.rows,
            DEPTH=config.depth,
            DOT=dot_type(weight.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
        )

    if rows:
        launch(tuner.best(tuple(weight.shape), launch))


def segments(
    cos_sin: Sequence[Sequence[int]],
    sinks: Sequence[Tensor],
    pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
) -> list[list[int]]:
    """For each head, keys first: its columns, how it is turned, where its sink and its pages lie.

    Addresses are counted, not asked for head by head: there are thousands of heads.
    """
    fields: list[list[int]] = []
    column = 0
    layers = zip(cos_sin, sinks, pages, slot_mapping, strict=True)
    for layer, (turn, own, page, slot) in enumerate(layers):
        heads, dims = page.shape[2:]
        sink, place, where = own.data_ptr(), page.data_ptr(), slot.data_ptr()
        across, between = own.stride(0), own.stride(1) * own.element_size()
        apart = page.stride(2) * page.element_size()
        inside = (page.stride(0), page.stride(1), page.stride(3), layer)
        for head in range(heads):
            begin = [column + head * dims, dims // 2, *turn]
            slots = [sink + head * between, across, where, page.shape[1]]
            fields.append([*begin, *slots, place + head * apart, *inside])
        column += heads * dims
    return fields
