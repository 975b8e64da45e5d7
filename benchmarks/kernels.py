"""Time the fused kernels beside what the machine can do, and beside the same work in plain torch.

    python benchmarks/kernels.py --out docs/figures/kernels.json

For each pair's geometry (from configs; random weights of the right shape and scale) and each number
of tokens: verify against the reference, then time. The floors are measured in the same run: a copy
of as many bytes, and a bfloat16 matrix product of as many operations. On a machine without CUDA the
reference itself is timed: the CPU path.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from awareness_kernels import ops, reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
BLOCK = 512
"""Tokens at once on a CPU, as `align.aligner` takes them."""


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


PAIRS = {
    "SmolLM2-135M → Gemma-3-270M": Pair(Side(15, 3, 64), Side(18, 1, 256, 640), 1024),
    "8B → 8B": Pair(Side(16, 8, 128), Side(32, 8, 128, 4096), 4096),
    "70B → 70B": Pair(Side(40, 8, 128), Side(80, 8, 128, 8192), 4096),
}


def encode_arguments(pair: Pair, tokens: int) -> list[Any]:
    """Random arguments of `encode_states` for a memory of so many tokens."""
    side = pair.source
    size = (tokens, side.heads, side.dims)
    angles = torch.rand(tokens, side.dims // 2, device=DEVICE)
    states = [torch.randn(size, device=DEVICE).bfloat16() for _ in range(2 * side.layers)]
    return [
        states[: side.layers],
        states[side.layers :],
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        torch.arange(tokens, device=DEVICE),
        torch.zeros(tokens, dtype=torch.bool, device=DEVICE),
        # A row of embedding for each token: bytes that are never read must not count.
        torch.arange(tokens + 1, device=DEVICE),
        torch.randn(tokens + 1, pair.target.embed, device=DEVICE).bfloat16(),
        torch.zeros(pair.features, device=DEVICE),
        torch.ones(pair.features, device=DEVICE),
        (torch.randn(pair.features, pair.rank, device=DEVICE) / pair.features**0.5).bfloat16(),
        pair.predecessors,
        1,
    ]


def decode_arguments(pair: Pair, latent: Tensor) -> list[Any]:
    """Random arguments of `decode_paged` for a latent [T, R] and a sink of one token."""
    side, rows = pair.target, len(latent) + 1
    pages = -(-rows // PAGE) + 1
    angles = torch.rand(rows, side.dims // 2, device=DEVICE)
    own = torch.randn(1, side.heads, side.dims, device=DEVICE).bfloat16()
    slots = torch.randperm(pages * PAGE, device=DEVICE)[:rows]

    def empty() -> list[Tensor]:
        size = (pages, PAGE, side.heads, side.dims)
        return [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(side.layers)]

    return [
        latent,
        (torch.randn(pair.rank, side.width, device=DEVICE) / pair.rank**0.5).bfloat16(),
        torch.zeros(side.width, device=DEVICE),
        torch.arange(rows, device=DEVICE),
        [angles.cos()] * side.layers,
        [angles.sin()] * side.layers,
        [0] * side.layers,
        [own] * side.layers,
        [own] * side.layers,
        empty(),
        empty(),
        [slots] * side.layers,
        torch.ones(2 * side.layers, device=DEVICE),
    ]


def rotate_arguments(written: list[Any]) -> list[Any]:
    """Arguments of `rotate_paged` for what `decode_paged` wrote."""
    turn = [[table[3].contiguous() for table in written[part]] for part in (4, 5)]
    return [written[9], written[11], *turn, written[6], written[12][: len(written[9])]]


def timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of a run: median, 20th and 80th percentile."""
    times = []
    for i in range(repeats + 2):
        synchronise()
        begin = time.perf_counter()
        run()
        synchronise()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - begin))
    quantiles = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return dict(zip(("median", "p20", "p80"), quantiles, strict=True))


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def floors(features: int, outputs: int, rows: int, moved: int, repeats: int) -> dict[str, float]:
    """The machine's own time for the work: a product of that shape, moving so many bytes."""
    x = torch.randn(rows, features, device=DEVICE).bfloat16()
    w = torch.randn(features, outputs, device=DEVICE).bfloat16()
    # Half of the bytes are read, half are written.
    a = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return {
        "product_ms": timed(lambda: x @ w, repeats)["median"] if outputs else 0.0,
        "copy_ms": timed(lambda: b.copy_(a), repeats)["median"],
    }


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    flat = [x for part in arguments for x in (part if isinstance(part, list) else [part])]
    return [x for x in flat if isinstance(x, Tensor)]


def verified(name: str, arguments: list[Any]) -> float:
    """The relative difference between the operator and the reference."""

    def run(function: Callable[..., Any]) -> list[Tensor]:
        copied = [[*part] if isinstance(part, list) else part for part in arguments]
        for part in {"encode_states": (), "decode_paged": (9, 10), "rotate_paged": (0,)}[name]:
            copied[part] = [page.clone() for page in copied[part]]
        result = function(*copied)
        return [result] if result is not None else [*copied[9 if name == "decode_paged" else 0]]

    ours, theirs = (run(f) for f in (getattr(ops, name), getattr(reference, name)))
    off = sum(
        (a.float() - b.float()).square().sum().item() for a, b in zip(ours, theirs, strict=True)
    )
    return (off / sum(b.float().square().sum().item() for b in theirs)) ** 0.5


def row(
    name: str, arguments: list[Any], product: tuple[int, int, int], repeats: int
) -> dict[str, Any]:
    """One operation: its time, the floors', the reference's in eager torch and compiled."""
    rows, features, outputs = product
    inputs = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_of(arguments)}
    moved = sum(inputs.values())
    if name == "rotate_paged":
        moved = 2 * sum(page.numel() * page.element_size() for page in arguments[0])
    plain = getattr(reference, name)
    found: dict[str, Any] = {
        "operation": name,
        "bytes": moved,
        "flop": 2 * rows * features * outputs,
        "difference": verified(name, arguments),
        "ms": timed(lambda: getattr(ops, name)(*arguments), repeats),
    }
    found |= floors(features, outputs, rows, moved, repeats)
    floor = max(found["product_ms"], found["copy_ms"])
    found["of_floor"] = floor / found["ms"]["median"]
    if DEVICE == "cuda":
        compiled = torch.compile(plain, dynamic=False)
        for label, function in (("eager", plain), ("compiled", compiled)):
            other = timed(lambda f=function: f(*arguments), repeats)["median"]
            found[f"{label}_ratio"] = other / found["ms"]["median"]
    return found


def measure(pair: Pair, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """All three operations for a memory of so many tokens; on a CPU, block by block."""
    block = tokens if DEVICE == "cuda" else min(tokens, BLOCK)
    encoded = encode_arguments(pair, block)
    with ops.tuning(DEVICE):
        written = decode_arguments(pair, ops.encode_states(*encoded))
        ops.decode_paged(*written)
    products = (block, pair.features, pair.rank), (block, pair.rank, pair.target.width)
    return [
        row("encode_states", encoded, products[0], repeats),
        row("decode_paged", written, products[1], repeats),
        row("rotate_paged", rotate_arguments(written), (block, 0, 0), repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for name in args.pairs:
            for tokens in args.tokens:
                for found in measure(PAIRS[name], tokens, args.repeats):
                    rows.append({"pair": name, "tokens": tokens, **found})
                    print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    document = {"device": machine, "torch": torch.__version__, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
