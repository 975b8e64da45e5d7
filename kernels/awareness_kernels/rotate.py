"""Re-rotation: keys that lie in pages, moved to other positions where they are, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from awareness_kernels.launch import (
    WARPS,
    Tables,
    aligned,
    angles,
    load_pairs,
    paged,
    scalar_type,
    scale_steps,
    slots,
    store_pairs,
    turns,
    upload_slots,
)


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    table, scales, rows,
    PAGE: tl.constexpr, FIELDS: tl.constexpr, DIMS: tl.constexpr, ROTATED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, WOVEN: tl.constexpr,
    ALIGN: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One layer's keys of ROWS tokens, all heads, all turned by the same angles."""
    field = table + tl.program_id(1) * FIELDS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot, written = slots(field + 3, row, row < rows)
    page, written = paged(field + 5, slot, PAGE, ALIGN), written[:, None]
    apart = aligned(field + 9, ALIGN)
    stride = 1 if DENSE else tl.load(field + 10)
    one = tl.zeros((1, 1), tl.int64)
    cos, sin = angles(field + 1, one, one == 0, ROTATED, PAIRS, ALIGN)
    scale, step = tl.load(field + 11), tl.load(field + 12)
    for head in range(tl.load(field)):
        at = page + head * apart
        unit = tl.load(scales + scale + head * step)
        a, b = load_pairs(at, stride, written, ROTATED, PAIRS, WOVEN)
        a, b = a * unit, b * unit
        a, b = (a * cos - b * sin) / unit, (b * cos + a * sin) / unit
        store_pairs(at, stride, a, b, written, PAGE, ROTATED, PAIRS, WOVEN)


def rotate_paged(
    key_pages: Sequence[Tensor],
    slot_mapping: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    interleaved: Sequence[int],
    scales: Tensor,
) -> None:
    """`reference.rotate_paged` in one launch; see there for arguments and result."""
    rows = max((len(slot) for slot in slot_mapping), default=0)
    if not rows:
        return
    device = key_pages[0].device
    sent, tables = upload_slots(slot_mapping, device), Tables()
    layers = zip(
        turns(cos, sin, interleaved), key_pages, sent, scale_steps(scales, key_pages), strict=True
    )
    for turn, page, slot, step in layers:
        if turn.rotated:
            _, size, heads, _ = page.shape
            fields = [heads, turn.cos, turn.sin, slot.data_ptr(), page.shape[0] * size]
            fields += [page.data_ptr(), size, *page.stride(), *step]
            tables.add([page], turn, (), fields)
    for head, table in tables.upload(device):
        rotate_kernel[(triton.cdiv(rows, head.rows), len(table))](
            table,
            scales,
            rows,
            PAGE=scalar_type(key_pages[0].dtype),
            FIELDS=table.shape[1],
            ROWS=head.rows,
            **head.constants,
            num_warps=WARPS,
        )
