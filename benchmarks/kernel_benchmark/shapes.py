"""Shapes of what is predicted and timed: pairs of models, and what each operation must do."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = {
    "encode_states": "pack + product",
    "decode_paged": "product + scatter",
    "rotate_paged": "rotate",
}
"""Each operation, and what it is on CUDA."""
SINK = 1


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


LARGE = {
    "8B → 8B": Pair(Side(16, 8, 128), Side(32, 8, 128, 4096), 4096),
    "70B → 70B": Pair(Side(40, 8, 128), Side(80, 8, 128, 8192), 4096),
}
PAIRS = {"SmolLM2-135M → Gemma-3-270M": Pair(Side(15, 3, 64), Side(18, 1, 256, 640), 1024)} | LARGE


def product(pair: Pair, tokens: int, operation: str) -> tuple[int, int, int]:
    """Rows, inner and outer width of the matrix product in an operation; widths of 0 for none."""
    if operation == "encode_states":
        return tokens, pair.features, pair.rank
    if operation == "decode_paged":
        return tokens, pair.rank, pair.target.width
    return tokens, 0, 0


def bytes_moved(pair: Pair, tokens: int, operation: str) -> int:
    """What must be read and written: each input once; of the pages, only what is in slots. Layers
    share their angles and slots."""
    source, target, rows = pair.source, pair.target, tokens + SINK
    pairs = target.dims // 2
    if operation == "encode_states":
        numbers = tokens * (source.width + pair.rank) + pair.features * pair.rank
        numbers += rows * target.embed
        single = 2 * pair.features + tokens * source.dims
        return 2 * numbers + 4 * single + 8 * (tokens + rows) + tokens
    if operation == "decode_paged":
        numbers = tokens * pair.rank + (pair.rank + rows) * target.width
        numbers += SINK * target.heads * target.dims
        single = target.width + 2 * rows * pairs + 2 * target.layers
        return 2 * numbers + 4 * single + 8 * 2 * rows
    # Re-rotation reads what it writes.
    return 2 * rows * target.width + 4 * (2 * pairs + target.layers) + 8 * rows


def flop(pair: Pair, tokens: int, operation: str) -> int:
    """The product's; where there is none, the turns': six for each pair of numbers."""
    rows, inner, outer = product(pair, tokens, operation)
    return 2 * rows * inner * outer or 3 * (tokens + SINK) * pair.target.width // 2


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
