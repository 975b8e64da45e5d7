"""A cold load from end to end, with random weights: pinned memory, through the map, to pages.

    python benchmarks/cold_load.py --out docs/figures/cold_load.json

Chunks of rows go up on a stream of their own while the chunk before is encoded and decoded. The
floor is the same bytes' time over PCIe, measured in the same run. Predicted: the longer one of copy
and kernels, and the first chunk's copy, which nothing goes on beside. Each row is written as it is
made; without a CUDA device it says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from awareness_kernels import ops
from kernel_benchmark import device
from kernel_benchmark.cases import decode_arguments, encode_arguments
from kernel_benchmark.clock import timed
from kernel_benchmark.predicted import ASSUMED, CARDS, predict
from kernel_benchmark.shapes import LARGE, PAIRS, SINK, Pair
from torch import Tensor

CHUNK = 2048
PCIE = 55e9
"""Bytes per second from pinned memory that sixteen lanes of PCIe 5 attain, of 63e9."""
BAR = 2.0


@dataclass
class Load:
    """A memory in host memory, pinned where there is a device, and the arguments of both operators
    that it is loaded by; every row of a chunk has a place in its stage."""

    states: list[Tensor]
    encode: list[Any]
    decode: list[Any]
    stages: list[list[Tensor]]

    @classmethod
    def of(cls, pair: Pair, tokens: int) -> Load:
        encode = encode_arguments(pair, tokens)
        states = [x.cpu() for x in (*encode[0], *encode[1])]
        if device.CUDA:
            states = [x.pin_memory() for x in states]
        chunk = min(CHUNK, tokens)
        stages = [
            [x.new_empty(chunk, *x.shape[1:]) for x in encode[0] + encode[1]] for _ in range(2)
        ]
        encode[0] = encode[1] = []
        latent = torch.empty(tokens, pair.rank, dtype=torch.bfloat16, device=device.DEVICE)
        return cls(states, encode, decode_arguments(pair, latent), stages)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.states)

    def upload(self, stage: list[Tensor], begin: int) -> list[Tensor]:
        rows = min(len(stage[0]), len(self.states[0]) - begin)
        for up, x in zip(stage, self.states, strict=True):
            up[:rows].copy_(x[begin : begin + rows], non_blocking=True)
        return [up[:rows] for up in stage]

    def step(self, states: list[Tensor], begin: int) -> None:
        """Encode and decode the rows from `begin` on, whose states are on the device."""
        rows, half = len(states[0]), len(states) // 2
        predecessors = self.encode[12]
        before = min(predecessors, begin + SINK)
        part, encode = slice(begin, begin + rows), self.encode
        latent = ops.encode_states(
            states[:half],
            states[half:],
            *cut(encode[2:4], part),
            encode[4],
            torch.arange(rows),
            encode[6][part],
            encode[7][begin + SINK - before : begin + SINK + rows],
            *encode[8:13],
            before,
        )
        first = begin + SINK if begin else 0
        decode, part = self.decode, slice(first, begin + SINK + rows)
        sinks = [[x[first:SINK] for x in own] for own in decode[7:9]]
        ops.decode_paged(
            latent, *decode[1:3], decode[3][part], *decode[4:7], *sinks, *decode[9:11],
            *cut(decode[11:12], part), decode[12],
        )  # fmt: skip

    def run(self) -> None:
        """The whole memory; returns when its last kernel is queued."""
        chunk = len(self.stages[0][0])
        begins = range(0, len(self.states[0]), chunk)
        if not device.CUDA:
            for begin in begins:
                self.step(self.upload(self.stages[0], begin), begin)
            return
        copies, kernels = torch.cuda.Stream(), torch.cuda.current_stream()
        # What the last run still reads must not be overwritten.
        copies.wait_stream(kernels)
        free: list[torch.cuda.Event | None] = [None, None]
        for i, begin in enumerate(begins):
            with torch.cuda.stream(copies):
                if (event := free[i % 2]) is not None:
                    copies.wait_event(event)
                states = self.upload(self.stages[i % 2], begin)
                there = copies.record_event()
            kernels.wait_event(there)
            self.step(states, begin)
            free[i % 2] = kernels.record_event()


def cut(lists: list[list[Tensor]], part: slice) -> list[list[Tensor]]:
    """Some rows of each layer's tensors; layers share theirs, and share the rows."""
    parts = []
    for tensors in lists:
        same = {id(x): x[part] for x in tensors}
        parts.append([same[id(x)] for x in tensors])
    return parts


def predicted(pair: Pair, tokens: int) -> dict[str, float]:
    """Milliseconds by the cost model, on the card whose peaks are assumed."""
    parts = [
        predict(pair, tokens, name, CARDS[ASSUMED]) for name in ("encode_states", "decode_paged")
    ]
    kernels = sum(part["ms"] for part in parts)
    copied = 1e3 * 2 * tokens * pair.source.width / PCIE
    first = copied * min(1.0, CHUNK / tokens)
    # The last chunk's kernels, too, have nothing beside them.
    total = max(first + kernels, copied + kernels * min(1.0, CHUNK / tokens))
    return {"pcie_ms": copied, "kernels_ms": kernels, "ms": total, "of_pcie": total / copied}


def measured(pair: Pair, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds from pinned memory to pages, and of the same bytes' copy alone."""
    load = Load.of(pair, tokens)
    found = timed(load.run, repeats)
    target = torch.empty(load.bytes, dtype=torch.uint8, device=device.DEVICE)
    source = torch.empty(load.bytes, dtype=torch.uint8, pin_memory=True)
    copied = timed(lambda: target.copy_(source, non_blocking=True), repeats)
    ratio = found["median"] / copied["median"]
    return {"pcie_ms": copied, "ms": found, "of_pcie": ratio, "reached": ratio <= BAR}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(LARGE))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    document: dict[str, Any] = device.machine() | {"rows": []}
    for name in args.pairs:
        row = {
            "pair": name,
            "tokens": args.tokens,
            "predicted": predicted(PAIRS[name], args.tokens),
        }
        row["measured"] = "not measured: no CUDA device"
        if device.CUDA:
            with torch.inference_mode(), contextlib.suppress(torch.cuda.OutOfMemoryError):
                row["measured"] = "not measured: the device's memory does not suffice"
                row["measured"] = measured(PAIRS[name], args.tokens, args.repeats)
        document["rows"].append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
