"""What all launchers share: tables of addresses, tile sizes, and which tile size serves best."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

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
REPEATS = 5
STILL = [0, 0, 0, 0]
"""What `tables` says of a layer's values: nothing turns them."""
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
def paired(pair, rotated, half, interleaved):
    """The two dims of each pair: side by side where interleaved, else as far apart as
    `rotated` pairs go; the dims beyond those are turned by nothing and pass in any pairing."""
    first = tl.where(interleaved == 1, 2 * pair, tl.where(pair < rotated, pair, rotated + pair))
    second = tl.where(
        interleaved == 1, 2 * pair + 1, pair + tl.where(pair < rotated, rotated, half)
    )
    return first, second


@triton.jit
def placed(field, slot, PAGE: tl.constexpr):
    """Where the states of slots lie, and the stride of their dims. From `field` on stand the page
    size, the address, and the strides of pages, of slots within one, and of dims."""
    size = tl.load(field)
    page = tl.load(field + 1).to(tl.pointer_type(PAGE))
    at = (slot // size) * tl.load(field + 2) + (slot % size) * tl.load(field + 3)
    return page + at[:, None], tl.load(field + 4)


@triton.jit
def angles(field, at, mask):
    """Cosines and sines at some places of the tables whose addresses stand from `field` on; no turn
    at all where masked."""
    cosines = tl.load(field).to(tl.pointer_type(tl.float32))
    sines = tl.load(field + 1).to(tl.pointer_type(tl.float32))
    return tl.load(cosines + at, mask=mask, other=1.0), tl.load(sines + at, mask=mask, other=0.0)


@dataclass(frozen=True)
class Config:
    """A tile: `rows` of tokens, `columns` of outputs, `depth` of a step of the product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass
class Tuner:
    """The fastest configuration for each shape. It measures in `warm_up` alone, never in a
    request: a shape that was not warmed up takes the first configuration."""

    configs: Sequence[Config]
    found: dict[Hashable, Config] = field(default_factory=dict)
    measuring: bool = False

    def best(self, shape: Hashable, launch: Callable[[Config], None]) -> Config:
        if self.measuring and shape not in self.found:
            self.found[shape] = min(self.configs, key=lambda config: seconds(launch, config))
        return self.found.get(shape, self.configs[0])


def seconds(launch: Callable[[Config], None], config: Config) -> float:
    """The shortest of a few runs; infinite where the device has no room for the tile."""
    times = []
    try:
        for _ in range(1 + REPEATS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            launch(config)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return min(times[1:])


def scalar_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype. Raises TypeError for one that no kernel knows."""
    if dtype not in SCALARS:
        raise TypeError(f"no kernel for {dtype}; there is one for {', '.join(map(str, SCALARS))}")
    return SCALARS[dtype]


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a product's operands. Triton's interpreter multiplies bfloat16 as the integers
    that it keeps them in, so it gets the same rounded numbers in float32."""
    return tl.float32 if INTERPRETED.value else scalar_type(dtype)


def padded_pairs(heads: Sequence[Tensor]) -> int:
    """Pairs of dims in the widest head [..., D], as a tile: a power of two, 16 at least."""
    return max(16, *(triton.next_power_of_2(head.shape[-1] // 2) for head in heads))


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of int64 on a device."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def tables(
    cos: Sequence[Tensor], sin: Sequence[Tensor], interleaved: Sequence[int]
) -> list[list[int]]:
    """For each layer: how many pairs are turned, whether the pairs are interleaved, and where its
    cosines and sines [P, C] are."""
    return [
        [c.shape[-1], w, c.data_ptr(), s.data_ptr()]
        for c, s, w in zip(cos, sin, interleaved, strict=True)
    ]
