"""Decode: the latent is multiplied by cuBLAS, block by block of rows, and a kernel that memory
bounds scatters each block to keys and values of all target layers, in their pages."""

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
    paged,
    pointer,
    scalar_type,
    scale_steps,
    shortest,
    slots,
    store_pairs,
    store_rest,
    turns,
    upload,
    upload_slots,
)


@triton.jit(do_not_specialize=["first", "rows", "sink", "held"])
def scatter_kernel(
    table, scales, mapped, bias, positions, outputs, first, rows, sink, held,
    PAGE: tl.constexpr, SINK: tl.constexpr, FIELDS: tl.constexpr, DIMS: tl.constexpr,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    WOVEN: tl.constexpr, ALIGN: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One layer's keys or values of ROWS tokens, all heads: the rows' outputs and the bias, rotated
    to their positions, in stored numbers, to their slots. `mapped` [rows, outputs] begins with the
    row after the sink, or with row `first`; the first `sink` rows of all are as cached. A row whose
    slot is in no page, or whose position is none of the `held`, is not written."""
    field = table + tl.program_id(1) * FIELDS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS) + first
    live = row < first + rows
    slot, written = slots(field + 4, row, live)
    place = tl.load(positions + row, mask=live, other=-1)
    new = (row >= sink)[:, None]
    written = written[:, None] & ((row < sink)[:, None] | ((place >= 0) & (place < held))[:, None])
    used = written & new
    page = paged(field + 6, slot, PAGE, ALIGN)
    apart = aligned(field + 10, ALIGN)
    stride = 1 if DENSE else tl.load(field + 11)
    heads, column = tl.load(field), aligned(field + 1, ALIGN)
    unit, step = tl.load(field + 12), tl.load(field + 13)
    at = mapped + (row - tl.maximum(first, sink))[:, None].to(tl.int64) * outputs
    own = pointer(field + 14, SINK, ALIGN) + row[:, None] * aligned(field + 15, ALIGN)
    between = aligned(field + 16, ALIGN)
    cached = written & (row < sink)[:, None]
    one = tl.zeros((1, 1), tl.int64)
    all_ = one == 0
    if ROTATED > 0:
        cos, sin = angles(field + 2, place[:, None], used, ROTATED, PAIRS, ALIGN)
    for head in range(heads):
        begin = column + head * DIMS
        to = page + head * apart
        inverse = 1.0 / tl.load(scales + unit + head * step)
        if ROTATED > 0:
            a, b = load_pairs(at + begin, 1, used, ROTATED, PAIRS, WOVEN)
            c, d = load_pairs(bias + begin + one, 1, all_, ROTATED, PAIRS, WOVEN)
            a, b = a + c, b + d
            a, b = a * cos - b * sin, b * cos + a * sin
            if first < sink:
                e, f = load_pairs(own + head * between, 1, cached, ROTATED, PAIRS, WOVEN)
                a, b = tl.where(new, a, e), tl.where(new, b, f)
            a, b = a * inverse, b * inverse
            store_pairs(to, stride, a, b, written, PAGE, ROTATED, PAIRS, WOVEN)
        if REST > 0:
            x = load_rest(at + begin, 1, used, ROTATED, REST, WIDTH)
            x += load_rest(bias + begin + one, 1, all_, ROTATED, REST, WIDTH)
            if first < sink:
                y = load_rest(own + head * between, 1, cached, ROTATED, REST, WIDTH)
                x = tl.where(new, x, y)
            store_rest(to, stride, x * inverse, written, PAGE, ROTATED, REST, WIDTH)


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
    """`reference.decode_paged` by product and scatter; see there for arguments and result."""
    tokens, outputs, device = len(latent), weight.shape[1], weight.device
    sink = len(positions) - tokens
    if not len(positions):
        return
    held, latent = shortest(cos), latent.to(weight.dtype)
    block = block_rows(outputs, weight.element_size())
    mapped = weight.new_empty(min(block, tokens), outputs)
    groups: list[tuple[Head, Tensor]] = []
    for begin in range(0, max(1, tokens), block):
        part = latent[begin : begin + block]
        if len(part):
            torch.mm(part, weight, out=mapped[: len(part)])
        if not groups:
            # While the first product runs already: there are hundreds of addresses to gather.
            positions, sent = upload(positions, device), upload_slots(slot_mapping, device)
            groups = page_tables(
                turns(cos, sin, interleaved),
                (*sink_keys, *sink_values),
                (*key_pages, *value_pages),
                sent,
                scale_steps(scales, (*key_pages, *value_pages)),
                outputs,
            ).upload(device)
        first = sink + begin if begin else 0
        rows = sink + begin + len(part) - first
        for head, table in groups:
            scatter(
                head, table, scales, mapped, bias, positions, first, rows, sink, held,
                key_pages[0], sink_keys[0],
            )  # fmt: skip


def scatter(
    head: Head,
    table: Tensor,
    scales: Tensor,
    mapped: Tensor,
    bias: Tensor,
    positions: Tensor,
    first: int,
    rows: int,
    sink: int,
    held: int,
    page: Tensor,
    own: Tensor,
) -> None:
    """Write the rows from `first` on into the pages of one group of layers."""
    scatter_kernel[(triton.cdiv(rows, head.rows), len(table))](
        table,
        scales,
        mapped,
        bias,
        positions,
        mapped.shape[1],
        first,
        rows,
        sink,
        held,
        PAGE=scalar_type(page.dtype),
        SINK=scalar_type(own.dtype),
        FIELDS=table.shape[1],
        ROWS=head.rows,
        **head.constants,
        num_warps=WARPS,
    )


def page_tables(
    turned: Sequence[Turn],
    sinks: Sequence[Tensor],
    pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    steps: Sequence[tuple[int, int]],
    outputs: int,
) -> Tables:
    """For each layer's keys, then values: their columns, how they are rotated, their slots, pages,
    scales and sink."""
    tables, column, count = Tables(), 0, len(turned)
    for i, (own, page, step) in enumerate(zip(sinks, pages, steps, strict=True)):
        size, heads, dims = page.shape[1:]
        turn = turned[i] if i < count else turned[i - count].still(dims)
        slot = slot_mapping[i % count].data_ptr()
        across, inside, apart, stride = page.stride()
        fields = [heads, column, turn.cos, turn.sin, slot, page.shape[0] * size]
        fields += [page.data_ptr(), size, across, inside, apart, stride, *step]
        fields += [own.data_ptr(), *own.stride()[:2]]
        tables.add([page, own], turn, (column, outputs), fields)
        column += heads * dims
    return tables
