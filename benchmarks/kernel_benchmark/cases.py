"""What is timed: each operation's random arguments for a memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from awareness_kernels import ops
from torch import Tensor

from kernel_benchmark import device
from kernel_benchmark.shapes import SINK, Pair

PAGE = 16
PAGES = {"encode_states": (), "decode_paged": (9, 10), "rotate_paged": (0,)}
"""Each operation, and which of its arguments are pages: it writes into them."""


@dataclass(frozen=True)
class Case:
    """One operation and its arguments."""

    operation: str
    arguments: list[Any]

    def resident(self) -> list[Any]:
        """The arguments for plain torch, whose indices must be on the device already."""

        def moved(x: Any) -> Any:
            if isinstance(x, list):
                # Layers share their tensors, on the device too.
                same = {id(y): moved(y) for y in x}
                return [same[id(y)] for y in x]
            return x.to(device.DEVICE) if isinstance(x, Tensor) else x

        return [moved(x) for x in self.arguments]


def normal(*size: int, scale: float = 1.0) -> Tensor:
    # In place: in float32 a map would take three times its own memory on the way.
    return torch.randn(size, dtype=torch.bfloat16, device=device.DEVICE).mul_(scale)


def encode_arguments(pair: Pair, tokens: int) -> list[Any]:
    """Random arguments of `encode_states` for a memory of so many tokens."""
    side = pair.source
    angles = torch.rand(tokens, side.dims // 2, device=device.DEVICE)
    states = [normal(tokens, side.heads, side.dims) for _ in range(2 * side.layers)]
    return [
        states[: side.layers],
        states[side.layers :],
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        torch.arange(tokens),
        torch.zeros(tokens, dtype=torch.bool),
        # A row of embedding for each token: bytes that are never read must not count.
        torch.arange(SINK + tokens),
        normal(SINK + tokens, pair.target.embed),
        torch.zeros(pair.features, device=device.DEVICE),
        torch.ones(pair.features, device=device.DEVICE),
        normal(pair.features, pair.rank, scale=pair.features**-0.5),
        pair.predecessors,
        SINK,
    ]


def decode_arguments(pair: Pair, latent: Tensor) -> list[Any]:
    """Random arguments of `decode_paged` for a latent [T, R] and a sink of one token."""
    side, rows = pair.target, len(latent) + SINK
    pages = -(-rows // PAGE) + 1
    angles = torch.rand(rows, side.dims // 2, device=device.DEVICE)
    own = normal(SINK, side.heads, side.dims)
    slot_mapping = torch.randperm(pages * PAGE)[:rows]

    def empty() -> list[Tensor]:
        size = (pages, PAGE, side.heads, side.dims)
        return [
            torch.zeros(size, dtype=torch.bfloat16, device=device.DEVICE)
            for _ in range(side.layers)
        ]

    return [
        latent,
        normal(pair.rank, side.width, scale=pair.rank**-0.5),
        torch.zeros(side.width, device=device.DEVICE),
        torch.arange(rows),
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        [own] * side.layers,
        [own] * side.layers,
        empty(),
        empty(),
        [slot_mapping] * side.layers,
        torch.ones(2 * side.layers, device=device.DEVICE),
    ]


def rotate_arguments(written: list[Any]) -> list[Any]:
    """Arguments of `rotate_paged` for what `decode_paged` wrote."""
    turn = [[table[3].contiguous() for table in written[part]] for part in (4, 5)]
    return [written[9], written[11], *turn, written[6], written[12][: len(written[9])]]


def cases(pair: Pair, tokens: int) -> Iterator[Case]:
    """All three operations for a memory of so many tokens, one after the other."""
    encoded = encode_arguments(pair, tokens)
    latent = ops.encode_states(*encoded)
    yield Case("encode_states", encoded)
    encoded.clear()  # The case has the same list: its memory is wanted now.
    written = decode_arguments(pair, latent)
    ops.decode_paged(*written)
    yield Case("decode_paged", written)
    yield Case("rotate_paged", rotate_arguments(written))
