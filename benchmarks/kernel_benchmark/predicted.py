"""A cost model: what each operation must take by its bytes, operations and instructions.

It needs no device. Peaks are those of a data sheet, times the share of them that is attained in
practice; where a device was there, its own copy and product were measured, and these are taken.

Why a sum. A product is bound by arithmetic, pack and scatter by memory, and they run one after the
other: their times add up. The larger floor, the product, is most of the sum, because a latent of
rank R makes 2 R operations of each feature, while pack moves some four bytes of it: at R = 4,096
that is 2,000 operations a byte, and a card makes 250 to 350 in the time that it moves one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from awareness_kernels.blocks import block_rows

from kernel_benchmark.shapes import Pair, bytes_moved, flop, product

Predicted = dict[str, float]


@dataclass(frozen=True)
class Peaks:
    """A card's rates: bytes of a copy (read and written) and operations of a bfloat16 product, per
    second; `sheet` says that they are a data sheet's times the attained shares below."""

    name: str
    copy: float
    product: float
    multiprocessors: int
    clock: float
    sheet: bool = True


COPY_SHARE = 0.9
"""Of the memory's rate on the sheet: copies of hundreds of megabytes attain 0.88 to 0.93."""
PRODUCT_SHARE = 0.72
"""Of the dense bfloat16 rate on the sheet: cuBLAS attains 620 to 760 of an H100's 989 TFLOP/s on
normal numbers, where the card's power is the limit."""
CARDS = {
    "A100 80 GB": Peaks("A100 80 GB", 2.04e12 * COPY_SHARE, 312e12 * 0.85, 108, 1.41e9),
    "H100 SXM": Peaks("H100 SXM", 3.35e12 * COPY_SHARE, 989e12 * PRODUCT_SHARE, 132, 1.7e9),
    "H200": Peaks("H200", 4.8e12 * COPY_SHARE, 989e12 * PRODUCT_SHARE, 132, 1.7e9),
    "B200": Peaks("B200", 7.7e12 * COPY_SHARE, 2250e12 * PRODUCT_SHARE, 148, 1.8e9),
}
"""An A100 keeps more of its peak: power does not limit it."""
ASSUMED = "H100 SXM"

ELEMENTWISE_SHARE = 0.88
"""Of a copy's rate. Both move whole vectors of 16 bytes; ours read and write turn by turn in a
thread. What hides memory's delay: 512 threads of a multiprocessor (at 126 and 104 registers), each
with 64 bytes on their way, are 32 KB, where a delay of 0.8 µs at half of 3 TB/s takes 9."""
ROTATE_SHARE = 0.94
"""The same with twice as many threads (64 registers), in place: rows are in pages of 32 KB."""
INSTRUCTIONS = {"pack": 14.3, "embeddings": 12.0, "scatter": 16.4, "rotate": 14.3}
"""Of a thread for each number written: sm_90's code for heads of 128, 8 of them, as ptxas made it
of Triton 3.9's, counted in the loop over heads and, divided by its turns, around it."""
LAUNCH = 6e-6
"""Seconds between two kernels of a call: the queue's, and the last programs' of the first one."""
TILE = (128, 256)
"""Rows and columns of cuBLAS's tile: a multiprocessor's share of the last wave may lie idle."""
SPLITS = (1, 2, 4, 8)
EAGER = {"pack": 74, "embeddings": 44, "scatter": 82, "rotate": 66}
"""Bytes of a number that eager torch reads and writes, counted in `reference`: every line of it is
a pass or more in float32 (a rotation alone 56 for keys, of which half of the states are)."""


def issue_rate(peaks: Peaks) -> float:
    """Instructions of threads per second: four warps of 32 a clock in each multiprocessor."""
    return peaks.multiprocessors * peaks.clock * 4 * 32


def pass_seconds(peaks: Peaks, part: str, numbers: float, moved: float) -> float:
    """An elementwise kernel: as long as memory takes, or the instructions, whichever is longer."""
    share = ROTATE_SHARE if part == "rotate" else ELEMENTWISE_SHARE
    return max(moved / (peaks.copy * share), numbers * INSTRUCTIONS[part] / issue_rate(peaks) / 0.8)


def product_seconds(peaks: Peaks, rows: int, inner: int, outer: int) -> float:
    """A product by its arithmetic, the last wave of tiles rounded up, or by its operands' bytes.
    Where many would be idle, tiles are split along the inner dimension, for partial sums in
    float32 that are written and read once."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(outer / TILE[1])
    arithmetic = 2 * rows * inner * outer / peaks.product
    best = math.inf
    for split in SPLITS:
        waves = split * tiles / peaks.multiprocessors
        sums = 8 * (split - 1) * rows * outer / peaks.copy
        best = min(best, arithmetic * math.ceil(waves) / waves + sums)
    return max(best, 2 * (rows * inner + inner * outer + rows * outer) / peaks.copy)


def elementwise(
    pair: Pair, tokens: int, operation: str, eager: bool = False
) -> dict[str, tuple[float, float]]:
    """For each elementwise part of an operation: the numbers that it writes, and the bytes that it
    reads and writes. Angles, means, scales and biases, which come from caches, count in full, but
    once in a program: it does all heads of 32 rows, or 8 embeddings."""
    source, target = pair.source, pair.target
    if operation == "encode_states":
        states, tokens_ = tokens * source.width, tokens * (1 + pair.predecessors) * target.embed
        angles = 8 * tokens * source.layers * source.dims // 2
        parts = {
            "pack": (states, states * (2 + 2 + 8 / 32) + angles),
            # Each embedding is read twice, once for its norm, and written for each predecessor.
            "embeddings": (tokens_, tokens_ * (2 + 8 / 8) + 4 * tokens * target.embed),
        }
    elif operation == "decode_paged":
        states = tokens * target.width
        angles = 8 * tokens * target.layers * target.dims // 2
        parts = {"scatter": (states, states * (2 + 2 + 4 / 32) + angles)}
    else:
        keys = tokens * target.width // 2
        parts = {"rotate": (keys, 4 * keys)}
    if eager:
        return {part: (numbers, numbers * EAGER[part]) for part, (numbers, _) in parts.items()}
    return parts


def predict(pair: Pair, tokens: int, operation: str, peaks: Peaks) -> Predicted:
    """Milliseconds of an operation's parts and of the floors, and the larger floor's fraction of
    their sum; eager torch's and an ideally fused torch.compile's multiple of it."""
    rows, inner, outer = product(pair, tokens, operation)
    passes = sum(
        pass_seconds(peaks, part, *counts)
        for part, counts in elementwise(pair, tokens, operation).items()
    )
    multiplied = floor = 0.0
    blocks = 1
    if outer:
        block = block_rows(outer if operation == "decode_paged" else inner, 2)
        sizes = [min(block, rows - begin) for begin in range(0, rows, block)]
        blocks = len(sizes)
        multiplied = sum(product_seconds(peaks, size, inner, outer) for size in sizes)
        floor = product_seconds(peaks, rows, inner, outer)
    moved = bytes_moved(pair, tokens, operation)
    copied = moved / peaks.copy
    kernels = {"encode_states": 3, "decode_paged": 2, "rotate_paged": 1}[operation]
    total = multiplied + passes + LAUNCH * kernels * blocks
    slow = sum(
        moved / peaks.copy for _, moved in elementwise(pair, tokens, operation, True).values()
    )
    # What a compiler can do at best: one pass that is a copy, no block's launch, the same product.
    ideal = floor + sum(
        moved / peaks.copy for _, moved in elementwise(pair, tokens, operation).values()
    )
    return {
        "bytes": moved,
        "flop": flop(pair, tokens, operation),
        "product_ms": 1e3 * floor,
        "copy_ms": 1e3 * copied,
        "elementwise_ms": 1e3 * passes,
        "ms": 1e3 * total,
        "of_floor": max(floor, copied) / total,
        "eager_ratio": (floor + slow) / total,
        "compiled_ratio": ideal / total,
    }
