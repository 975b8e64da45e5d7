"""Re-rotation: keys that lie in pages, moved to other positions where they are, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from awareness_kernels.launch import (
    angles,
    narrow,
    on_device,
    padded_pairs,
    paired,
    placed,
    scalar_type,
    tables,
)

ROWS = 64


@triton.jit
def rotate_kernel(
    segments,
    scales,
    rows,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One head's keys of ROWS tokens, all turned by the same angles."""
    field = segments + tl.program_id(0) * FIELDS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rotated, interleaved = tl.load(field), tl.load(field + 1)
    pair = tl.arange(0, PAIRS)
    first, second = paired(pair, rotated, rotated, interleaved)
    cos_sin = pair < rotated
    c, d = angles(field + 2, pair, cos_sin)
    slot_mapping = tl.load(field + 4).to(tl.pointer_type(tl.int64))
    slot = tl.load(slot_mapping + row, mask=row < rows, other=-1)
    page, stride = placed(field + 5, slot, PAGE)
    kept = (slot >= 0)[:, None] & cos_sin[None, :]
    unit = tl.load(scales + tl.load(field + 10))
    a = tl.load(page + first[None, :] * stride, mask=kept, other=0.0).to(tl.float32) * unit
    b = tl.load(page + second[None, :] * stride, mask=kept, other=0.0).to(tl.float32) * unit
    one, two = a * c[None, :] - b * d[None, :], b * c[None, :] + a * d[None, :]
    tl.store(page + first[None, :] * stride, narrow(one / unit, PAGE), mask=kept)
    tl.store(page + second[None, :] * stride, narrow(two / unit, PAGE), mask=kept)


def rotate_paged(
    key_pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    scales: Tensor,
) -> None:
    """`reference.rotate_paged` in one launch; see there for arguments and result."""
    fields: list[list[int]] = []
    for layer, (turn, page, slot) in enumerate(
        zip(tables(cos, sin, interleaved), key_pages, slot_mapping, strict=True)
    ):
        where, place, apart = slot.data_ptr(), page.data_ptr(), page.stride(2) * page.element_size()
        inside = (page.stride(0), page.stride(1), page.stride(3), layer)
        for head in range(page.shape[2] if turn[0] else 0):
            fields.append([*turn, where, page.shape[1], place + head * apart, *inside])
    rows = max((len(slot) for slot in slot_mapping), default=0)
    if not rows or not fields:
        return
    table = on_device(fields, key_pages[0].device)
    rotate_kernel[(len(fields), triton.cdiv(rows, ROWS))](
        table,
        scales,
        rows,
        PAGE=scalar_type(key_pages[0].dtype),
        FIELDS=table.shape[1],
        PAIRS=padded_pairs(key_pages),
        ROWS=ROWS,
    )
