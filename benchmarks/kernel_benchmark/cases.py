"""What is timed: pairs of models, and each operation's random arguments for a memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from awareness_kernels import ops
from torch import Tensor

from kernel_benchmark import device

PAGE = 16
PAGES = {"encode_states": (), "decode_paged": (9, 10), "rotate_paged": (0,)}
"""Each operation, and which of its arguments are pages: it writes into them."""


@dataclass(frozen=True)
class Side:
    """One model's cache: layers that are read or written, KV heads, head dim, embedding width."""

    layers: int
    heads: int
    dims: int
    embed: int = 0

    @property
    def width(self) -> int:
        return 2 * self.layers * self.heads * self.dims


@dataclass(frozen=True)
class Pair:
    source: Side
    target: Side
    rank: int
    predecessors: int = 3

    @property
    def features(self) -> int:
        return self.source.width + (1 + self.predecessors) * self.target.embed


@dataclass(frozen=True)
class Case:
    """One operation and its arguments; `product` is the matrix product in it: rows, features and
    outputs."""

    operation: str
    arguments: list[Any]
    product: tuple[int, int, int]


LARGE = {
    "8B → 8B": Pair(Side(16, 8, 128), Side(32, 8, 128, 4096), 4096),
    "70B → 70B": Pair(Side(40, 8, 128), Side(80, 8, 128, 8192), 4096),
}
PAIRS = {"SmolLM2-135M → Gemma-3-270M": Pair(Side(15, 3, 64), Side(18, 1, 256, 640), 1024)} | LARGE


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
        torch.arange(tokens, device=device.DEVICE),
        torch.zeros(tokens, dtype=torch.bool, device=device.DEVICE),
        # A row of embedding for each token: bytes that are never read must not count.
        torch.arange(tokens + 1, device=device.DEVICE),
        normal(tokens + 1, pair.target.embed),
        torch.zeros(pair.features, device=device.DEVICE),
        torch.ones(pair.features, device=device.DEVICE),
        normal(pair.features, pair.rank, scale=pair.features**-0.5),
        pair.predecessors,
        1,
    ]


def decode_arguments(pair: Pair, latent: Tensor) -> list[Any]:
    """Random arguments of `decode_paged` for a latent [T, R] and a sink of one token."""
    side, rows = pair.target, len(latent) + 1
    pages = -(-rows // PAGE) + 1
    angles = torch.rand(rows, side.dims // 2, device=device.DEVICE)
    own = normal(1, side.heads, side.dims)
    slot_mapping = torch.randperm(pages * PAGE, device=device.DEVICE)[:rows]

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
        torch.arange(rows, device=device.DEVICE),
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
    with ops.tuning(device.DEVICE):
        latent = ops.encode_states(*encoded)
    yield Case("encode_states", encoded, (tokens, pair.features, pair.rank))
    encoded.clear()  # The case has the same list: its memory is wanted now.
    written = decode_arguments(pair, latent)
    with ops.tuning(device.DEVICE):
        ops.decode_paged(*written)
    yield Case("decode_paged", written, (tokens, pair.rank, pair.target.width))
    yield Case("rotate_paged", rotate_arguments(written), (tokens, 0, 0))


def bytes_moved(case: Case) -> int:
    """What must be read and written: each input once; of the pages, only what is in slots."""
    paged, flat = PAGES[case.operation], []
    for i, part in enumerate(case.arguments):
        flat += [] if i in paged else part if isinstance(part, list) else [part]
    # Layers share their angles and slots.
    inputs = {x.data_ptr(): x.numel() * x.element_size() for x in flat if isinstance(x, Tensor)}
    # Re-rotation reads what it writes.
    times = 2 if case.operation == "rotate_paged" else 1
    return sum(inputs.values()) + 2 * times * numbers_written(case)


def numbers_written(case: Case) -> int:
    """How many an operation writes, each of two bytes."""
    if case.operation == "encode_states":
        return case.product[0] * case.product[2]
    slot_mapping = case.arguments[11 if case.operation == "decode_paged" else 1][0]
    pages = [page for part in PAGES[case.operation] for page in case.arguments[part]]
    return sum(len(slot_mapping) * page[0, 0].numel() for page in pages)


def flop(case: Case) -> int:
    """The product's; where there is none, the turns': six for each pair of numbers."""
    rows, features, outputs = case.product
    return 2 * rows * features * outputs or 3 * numbers_written(case)


def needed(pair: Pair, tokens: int) -> dict[str, tuple[int, int]]:
    """Bytes for each operation: arguments beside a floor's operands, about as much again; and what
    the reference takes beside the arguments, with a copy of the pages to compare."""
    features, outputs = pair.features, pair.target.width

    def operands(inner: int, outer: int) -> int:
        return 2 * (tokens * inner + inner * outer + tokens * outer)

    encode, decode = operands(features, pair.rank), operands(pair.rank, outputs)
    return {
        # Features in float32 three and a half times: by layer, side by side, less the mean, scaled.
        "encode_states": (2 * encode, 14 * tokens * features),
        # The product, the same in float32 with the bias, and the copy.
        "decode_paged": (2 * decode, 8 * tokens * outputs),
        # The copy of the keys, and a layer in float32 a few times.
        "rotate_paged": (2 * decode, 2 * tokens * outputs),
    }
