"""Time of the cold alignment of a memory, beside the matrix products that it needs.

    python benchmarks/alignment.py --source SMOLLM2 --target GEMMA3 --text FILE --rank 1024

The map has random weights of the right shape: the time does not depend on them. `share` is the
processor's own time for the two bfloat16 products, measured in the same run, over the alignment's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from awareness_vllm.align.realign import BLOCK, realign
from awareness_vllm.fit.layers import spread_layers
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import load_model, sink_ids, sink_states
from awareness_vllm.packages.capture import capture
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

CHARACTERS = 12_000


def random_map(source: Path, target: Path, rank: int) -> WMatrix:
    """A map of random weights between two models."""
    geometries = geometry_of(source), geometry_of(target)
    sink = sink_ids(target)
    manifest = WMatrixManifest(
        source=geometries[0],
        target=geometries[1],
        layers=spread_layers(None, len(geometries[0].layers)),
        rank=rank,
        predecessors=3,
        sink=tuple(sink),
        anchors=Anchors(digest="none", documents=0, tokens=0),
        fit={},
        r2={},
        reconstruction_error=0.0,
        versions={},
    )
    features = manifest.source_width + manifest.embedding_width
    keys, values = sink_states(target, sink)
    return WMatrix(
        manifest,
        mean=torch.zeros(features),
        scale=torch.ones(features),
        encode=(torch.randn(features, rank) / features**0.5).bfloat16(),
        decode=(torch.randn(rank, geometries[1].width) / rank**0.5).bfloat16(),
        bias=torch.zeros(geometries[1].width),
        sink_keys=keys,
        sink_values=values,
    )


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, type=resolve_folder)
    parser.add_argument("--target", required=True, type=resolve_folder)
    parser.add_argument("--text", required=True, type=Path, help="a long text")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    wmatrix = random_map(args.source, args.target, args.rank)
    package = capture(args.source, args.text.read_text()[:CHARACTERS])
    embed = load_model(args.target).get_input_embeddings()
    features = torch.randn(BLOCK, len(wmatrix.mean)).bfloat16()

    def align() -> int:
        with torch.inference_mode():
            memory = realign(package, wmatrix, args.target, embed, dtype=torch.bfloat16)
        return len(memory.ids)

    def products() -> None:
        features @ wmatrix.encode @ wmatrix.decode

    tokens = align()
    aligned = milliseconds(align, args.repeats)
    needed = milliseconds(products, args.repeats) * tokens / BLOCK
    flop = 2 * tokens * (wmatrix.encode.numel() + wmatrix.decode.numel())
    document = {
        "tokens": tokens,
        "rank": args.rank,
        "alignment_ms": round(aligned, 1),
        "products_ms": round(needed, 1),
        "share": round(needed / aligned, 3),
        "gflop_per_s": round(flop / aligned / 1e6, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
