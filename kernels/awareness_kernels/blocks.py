"""How many rows a call works on at once, and so the memory that it takes."""

from __future__ import annotations

SCRATCH = 2**28
"""Bytes, at most, that a call takes beside its arguments: features or outputs of some rows."""
MOST_ROWS = 2048
"""Rows beyond which a product does not get any faster."""


def block_rows(width: int, itemsize: int) -> int:
    """Rows [.., width] of a block: a power of two, so that they fill a product's tiles."""
    rows = MOST_ROWS
    while rows > 1 and rows * width * itemsize > SCRATCH:
        rows //= 2
    return rows
