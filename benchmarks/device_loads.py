"""The product's own cold and warm loads on a device, without vLLM, against PCIe's time.

    python benchmarks/device_loads.py --out docs/figures/device_loads.json

A memory in pageable host memory goes through the lanes of `align/workspace` and is written into
pages. States and weights are constants, since times do not depend on them. `engine_ms` is what the
engine's thread spends, in all steps together: what a model's steps wait for. Rows are written as
they are made; without a CUDA device they say so.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.align.encoding import LatentEncoding, warm_up
from awareness_vllm.align.footprint import Footprint, device_bytes
from awareness_vllm.align.paged import PagedMap, Pages
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

PAGE = 16
SHAPES = {"8B": (32, 8, 128, 4096, 4096), "70B": (80, 8, 128, 8192, 4096)}
TINY = (2, 2, 16, 32, 16)
"""Layers, KV heads, head dim, hidden size and rank, of source and target alike."""


@dataclass
class Case:
    """A map on a device, a memory in host memory, and pages."""

    paged: PagedMap
    states: list[Tensor]
    ids: list[int]
    source: Tensor
    table: Tensor
    pages: list[Pages]
    slots: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], tokens: int, device: str) -> Case:
        layers, heads, dims, hidden, rank = shape
        manifest = manifest_of(layers, heads, dims, hidden, rank)
        features, outputs = manifest.source_width + manifest.token_width, manifest.target.width
        dtype, sink = torch.bfloat16, len(manifest.sink)
        sinks = [torch.zeros(sink, heads, dims) for _ in range(layers)]
        wmatrix = WMatrix(
            manifest,
            torch.zeros(features),
            torch.ones(features),
            torch.full((features, rank), 2.0**-10, dtype=dtype),
            torch.full((rank, outputs), 2.0**-10, dtype=dtype),
            torch.zeros(outputs),
            sinks,
            sinks,
        )
        rows = tokens + sink
        workspace = DeviceWorkspace(device, 1 << max(11, rows.bit_length()))
        paged = PagedMap(wmatrix, {i: slice(None) for i in range(layers)}, workspace)
        blocks = -(-rows // PAGE)
        caches = [
            torch.zeros(blocks, heads, PAGE, 2 * dims, dtype=dtype, device=device)
            for _ in range(layers)
        ]
        pages = [Pages(*cache.transpose(1, 2).split(dims, dim=-1)) for cache in caches]
        warm_up(paged, pages)
        return cls(
            paged,
            [torch.ones(tokens, heads, dims, dtype=dtype) for _ in range(layers)],
            [0] * rows,
            torch.arange(tokens),
            torch.ones(1, hidden, dtype=dtype, device=device),
            pages,
            torch.arange(rows),
        )

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids.to(self.table.device)].float()

    def load(self) -> dict[str, float]:
        """Milliseconds of a load from package to pages, and of the engine's thread in it."""
        begin, engine = time.perf_counter(), 0.0
        encoding = LatentEncoding(
            self.paged, self.states, self.states, self.ids, self.source, self.embed
        )
        complete = False
        while not complete:
            if encoding.awaited:
                wait(encoding.awaited, return_when=FIRST_COMPLETED)
            step = time.perf_counter()
            complete = encoding.step()
            engine += time.perf_counter() - step
        encoded = time.perf_counter()
        self.paged.write(encoding.memory, self.pages, [self.slots] * len(self.pages), begin=0)
        engine += time.perf_counter() - encoded
        if self.table.is_cuda:
            torch.cuda.synchronize()
        end = time.perf_counter()
        seconds = {"ms": end - begin, "write_ms": end - encoded, "engine_ms": engine}
        return {name: 1e3 * value for name, value in seconds.items()}


def manifest_of(layers: int, heads: int, dims: int, hidden: int, rank: int) -> WMatrixManifest:
    rope = Positions(scheme="rope", theta=5e5, rotary_dim=dims)
    layer = LayerGeometry(heads=heads, head_dim=dims, positions=rope)
    side = Geometry(
        name="synthetic",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=hidden,
        vocab_size=2,
        max_positions=1 << 17,
        layers=(layer,) * layers,
        weights="w" * 64,
        tokenizer="t" * 64,
    )
    return WMatrixManifest(
        source=side,
        target=side,
        layers=tuple(range(0, layers, 2)),
        rank=rank,
        predecessors=3,
        sink=(0,),
        anchors=Anchors(digest="a" * 64, documents=1, tokens=1),
        fit={},
        r2={},
        versions={},
    )


def pcie_ms(size: int) -> float:
    """Milliseconds in which so many bytes go up from pinned memory."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def measured(shape: tuple[int, ...], tokens: int, device: str, repeats: int) -> dict[str, Any]:
    """The fastest of some loads, and on CUDA what the map took of the device at most."""
    case = Case.of(shape, tokens, device)
    loads = [case.load() for _ in range(repeats)]
    row: dict[str, Any] = min(loads, key=lambda load: load["ms"])
    manifest = case.paged.manifest
    heads = {i: slice(None) for i in range(len(manifest.target.layers))}
    row["counted_bytes"] = device_bytes([(manifest, 2)], heads, case.paged.workspace.positions)
    row["transient_bytes"] = row["counted_bytes"] - Footprint.of(manifest, heads, 2).tensors
    if device == "cuda":
        pages = sum(2 * page.keys.nbytes for page in case.pages) + case.table.nbytes
        row["allocated_bytes"] = torch.cuda.max_memory_allocated() - pages
        row["within_counted"] = row["allocated_bytes"] <= row["counted_bytes"]
        row["pcie_ms"] = pcie_ms(2 * tokens * manifest.source_width)
        row["of_pcie"] = row["ms"] / row["pcie_ms"]
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    document: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "rows": []}
    for name in args.shapes:
        row: dict[str, Any] = {"shape": name, "tokens": args.tokens, "device": args.device}
        row["measured"] = "not measured: no CUDA device"
        if args.device == "cpu" or torch.cuda.is_available():
            shape = SHAPES.get(name, TINY)
            row["measured"] = measured(shape, args.tokens, args.device, args.repeats)
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
