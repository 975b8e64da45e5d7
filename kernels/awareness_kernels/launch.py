"""What all launchers share: how a head's dims are read and written, and the tables of addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SCALARS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
TILE = 4096
"""Numbers of a program's tile: 32 for each of its 128 threads, in four loads of 16 bytes."""
WARPS = 4
VECTOR = 8
"""Numbers of a vector: 16 bytes of bf16. What is aligned to more is not read any faster."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels were defined for Triton's interpreter, which works on a CPU."""


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 to the nearest number of another type within `reference.largest`, what is no number
    to 0. The interpreter cuts bits off instead, so there the bits that it will cut are rounded
    first."""
    MOST: tl.constexpr = 448.0 if tl.float8e4nv == TYPE else 32768.0
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -MOST), MOST), 0.0)
    if INTERPRETED and (tl.bfloat16 == TYPE or tl.float8e4nv == TYPE):
        CUT: tl.constexpr = 16 if tl.bfloat16 == TYPE else 20
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << (CUT - 1)) - 1 + ((bits >> CUT) & 1)
        x = ((bits >> CUT) << CUT).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def load_pairs(at, stride, used, ROTATED: tl.constexpr, PAIRS: tl.constexpr, WOVEN: tl.constexpr):
    """The two dims [ROWS, PAIRS] of each rotated pair in float32, of rows that begin at `at`
    [ROWS, 1]; 0 where not `used` [ROWS, 1]. Woven pairs are read in one piece and then parted."""
    if WOVEN:
        dim = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(at + dim * stride, mask=used & (dim < 2 * ROTATED), other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (at.shape[0], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        known = used & (pair < ROTATED)
        a = tl.load(at + pair * stride, mask=known, other=0.0).to(tl.float32)
        b = tl.load(at + (pair + ROTATED) * stride, mask=known, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(
    at, stride, a, b, used, TYPE: tl.constexpr,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, WOVEN: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_pairs`, narrowed to the TYPE of what lies there."""
    if WOVEN:
        dim = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(a, b), (at.shape[0], 2 * PAIRS))
        tl.store(at + dim * stride, narrow(x, TYPE), mask=used & (dim < 2 * ROTATED))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        known = used & (pair < ROTATED)
        tl.store(at + pair * stride, narrow(a, TYPE), mask=known)
        tl.store(at + (pair + ROTATED) * stride, narrow(b, TYPE), mask=known)


@triton.jit
def load_rest(at, stride, used, ROTATED: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """The REST dims beyond the rotated pairs as [ROWS, WIDTH] in float32."""
    dim = tl.arange(0, WIDTH)[None, :]
    known = used & (dim < REST)
    return tl.load(at + (dim + 2 * ROTATED) * stride, mask=known, other=0.0).to(tl.float32)


@triton.jit
def store_rest(
    at, stride, x, used, TYPE: tl.constexpr,
    ROTATED: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rest`."""
    dim = tl.arange(0, WIDTH)[None, :]
    known = used & (dim < REST)
    tl.store(at + (dim + 2 * ROTATED) * stride, narrow(x, TYPE), mask=known)


@triton.jit
def angles(field, place, known, ROTATED: tl.constexpr, PAIRS: tl.constexpr, ALIGN: tl.constexpr):
    """Cosines and sines [ROWS, PAIRS] of places [ROWS, 1] in the tables whose addresses stand from
    `field` on; those of no turn where not `known` or where there are no tables."""
    pair = tl.arange(0, PAIRS)[None, :]
    known = known & (pair < ROTATED)
    at = place * ROTATED + pair
    cos, sin = tl.full(at.shape, 1.0, tl.float32), tl.full(at.shape, 0.0, tl.float32)
    if tl.load(field) != 0:
        cos = tl.load(pointer(field, tl.float32, ALIGN) + at, mask=known, other=1.0)
        sin = tl.load(pointer(field + 1, tl.float32, ALIGN) + at, mask=known, other=0.0)
    return cos, sin


@triton.jit
def aligned(field, ALIGN: tl.constexpr):
    """A stride or an offset from a table; the compiler is told that ALIGN divides it, without which
    it would read number by number."""
    return tl.multiple_of(tl.load(field), ALIGN)


@triton.jit
def pointer(field, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An address from a table, of numbers of a TYPE; ALIGN of them divide it."""
    BYTES: tl.constexpr = ALIGN * (TYPE.primitive_bitwidth // 8)
    return tl.multiple_of(tl.load(field).to(tl.pointer_type(TYPE)), BYTES)


@triton.jit
def slots(field, row, live):
    """The slots [ROWS] of rows, and which of them there are: from `field` on stand the address of
    the slots, and how many there are in the pages."""
    slot = tl.load(tl.load(field).to(tl.pointer_type(tl.int64)) + row, mask=live, other=-1)
    return slot, (slot >= 0) & (slot < tl.load(field + 1))


@triton.jit
def paged(field, slot, PAGE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the states of slots [ROWS] begin, [ROWS, 1]. From `field` on stand the address, the
    page size, and the strides of pages and of slots within one."""
    size = tl.load(field + 1)
    at = (slot // size) * aligned(field + 2, ALIGN) + (slot % size) * aligned(field + 3, ALIGN)
    return pointer(field, PAGE, ALIGN) + at[:, None]


class Head(NamedTuple):
    """What a kernel is compiled for: a head's dims, of which the first `2 * rotated` turn in pairs,
    the numbers that divide all strides and addresses, and whether dims lie side by side."""

    dims: int
    rotated: int
    woven: bool
    align: int
    dense: bool

    @property
    def constants(self) -> dict[str, int | bool]:
        rest = self.dims - 2 * self.rotated
        return {
            "DIMS": self.dims,
            "ROTATED": self.rotated,
            "PAIRS": triton.next_power_of_2(max(1, self.rotated)),
            "REST": rest,
            "WIDTH": triton.next_power_of_2(max(1, rest)),
            "WOVEN": self.woven,
            "ALIGN": self.align,
            "DENSE": self.dense,
        }

    @property
    def rows(self) -> int:
        """Rows of a tile: what a thread holds stays the same for any head. It is half as much where
        some dims rotate and others do not, and where each number needs an address of its own: a
        whole tile would not stay in registers."""
        simple = self.dense and self.align == VECTOR and 2 * self.rotated in (0, self.dims)
        return max(1, (TILE if simple else TILE // 2) // triton.next_power_of_2(self.dims))


class Turn(NamedTuple):
    """How a layer's keys are rotated: how many pairs, whether they are interleaved, and the
    addresses of its cosines and sines; 0 where nothing is rotated."""

    rotated: int
    woven: bool
    cos: int
    sin: int

    def still(self, dims: int) -> Turn:
        """The layer's values': nothing rotates them, but they are read as the keys are, so that one
        kernel serves both."""
        return Turn(min(self.rotated, dims // 2), self.woven, 0, 0)


Fields = list[list[int]]
"""A table's rows, one for each layer's keys or values."""


class Tables:
    """Rows of addresses and strides by the kernel that they need. One launch serves a group, which
    are all layers of most models."""

    def __init__(self) -> None:
        self.groups: dict[Head, Fields] = {}

    def add(
        self, states: Sequence[Tensor], turn: Turn, numbers: Sequence[int], fields: list[int]
    ) -> None:
        """A layer's keys or values.

        Args:
            states: [..., H, D], all that its kernel reads and writes by addresses; the first one's
                dims may be apart.
            numbers: offsets and strides, in numbers, that the kernel adds up.
            fields: the row of the table.
        """
        first, rotated = states[0], turn.rotated
        dims = first.shape[-1]
        align = math.gcd(VECTOR, dims, *numbers, turn.cos // 4, turn.sin // 4)
        align = math.gcd(align, *map(offsets, states))
        head = Head(dims, rotated, turn.woven and rotated > 0, align, first.stride(-1) == 1)
        self.groups.setdefault(head, []).append(fields)

    def upload(self, device: torch.device) -> list[tuple[Head, Tensor]]:
        return [
            (head, upload(torch.tensor(rows, dtype=torch.int64), device))
            for head, rows in self.groups.items()
        ]


def offsets(x: Tensor) -> int:
    """The numbers, as many as possible, that the rows of x are multiples of in memory."""
    return math.gcd(x.data_ptr() // x.element_size(), *x.stride()[:-1])


def shortest(tables: Sequence[Tensor]) -> int:
    """Rows of the shortest table; most are one tensor, and to ask a tensor takes a microsecond."""
    return min(table.shape[0] for table in {id(table): table for table in tables}.values())


def turns(cos: Sequence[Tensor], sin: Sequence[Tensor], interleaved: Sequence[int]) -> list[Turn]:
    """How each layer's keys are rotated, by its cosines and sines [P, C] or [C]."""
    return [
        Turn(c.shape[-1], bool(w), c.data_ptr(), s.data_ptr())
        for c, s, w in zip(cos, sin, interleaved, strict=True)
    ]


def scalar_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype. Raises TypeError for one that no kernel knows."""
    if dtype not in SCALARS:
        raise TypeError(f"no kernel for {dtype}; there is one for {', '.join(map(str, SCALARS))}")
    return SCALARS[dtype]


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. Nothing waits: a copy from memory that is not pinned would."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def upload_slots(slot_mapping: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The slots of each layer on a device; those of a KV cache group, one tensor, go up once."""
    sent: dict[int, Tensor] = {}
    for slot in slot_mapping:
        if slot.data_ptr() not in sent:
            sent[slot.data_ptr()] = upload(slot, device)
    return [sent[slot.data_ptr()] for slot in slot_mapping]


def scale_steps(scales: Tensor, pages: Sequence[Tensor]) -> list[tuple[int, int]]:
    """For each layer's pages where its scales begin, and how far the next head's is from there: all
    heads of a layer share one, or each has its own."""
    if len(scales) == len(pages):
        return [(i, 0) for i in range(len(pages))]
    begins = [0]
    for page in pages:
        begins.append(begins[-1] + page.shape[2])
    return [(begin, 1) for begin in begins[:-1]]
