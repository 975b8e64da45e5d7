"""Memories for a fine-tuned or quantised variant of the model that made them.

`python benchmarks/variant.py --kind tuned` makes a variant of Gemma-3-270M (a short fine-tuning on
speeches, or 8-bit weights), fits a W-Matrix of low rank from the original to it, and measures it in
five arms on held-out texts, beside the copied memory, without any map.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from awareness_demo.anchors import held_out_dir

from awareness_vllm.anchors.corpus import load, windows
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.files import anchors_dir, models_dir
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.hf import load_model
from awareness_vllm.models.tokens import load_tokenizer
from awareness_vllm.wmatrix.file import WMatrix

HELD_OUT = ("crawl", "debian-history", "wordnet")
STEPS, RATE = 40, 1e-5


def tune(model: Any, folder: Path) -> None:
    """A short fine-tuning of all weights on presidents' speeches: AdamW, one window a step."""
    tokenizer = load_tokenizer(str(folder))
    texts = [w for d in load([anchors_dir() / "speeches"]) for w in windows(d, 1600)][::60]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step, text in enumerate(texts[:STEPS]):
        ids = torch.tensor([tokenizer.encode(text).ids])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def quantise(model: Any, folder: Path) -> None:
    """All weight matrices to 8 bits, a scale for each output."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)


KINDS = {"tuned": tune, "quantised": quantise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="tuned")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--limit", type=int, default=24)
    args = parser.parse_args()
    original = models_dir() / "gemma3-270m"
    with tempfile.TemporaryDirectory() as temporary:
        variant = Path(temporary) / f"gemma3-270m-{args.kind}"
        make_variant(original, variant, args.kind)
        config = FitConfig(
            tokens=args.tokens, rank=args.rank, predecessors=0, calibration=0, ridge=0.07
        )
        started = time.perf_counter()
        wmatrix = fit(original, variant, load([anchors_dir()]), config)
        seconds = time.perf_counter() - started
        harness = EvalHarness(original, variant, wmatrix)
        texts = load([held_out_dir() / name for name in HELD_OUT])
        mapped = evaluate_texts(harness, texts, limit=args.limit).summary()
        harness.wmatrix = copy_map(wmatrix)
        plain = evaluate_texts(harness, texts, limit=args.limit).summary()
    print(
        json.dumps(
            {
                "kind": args.kind,
                "fit_seconds": round(seconds),
                "r2": wmatrix.manifest.r2,
                "map": mapped,
                "copy": plain,
            },
            indent=1,
        )
    )


def make_variant(original: Path, variant: Path, kind: str) -> None:
    """Write a folder with the variant's weights and the original's tokenizer."""
    model = load_model(original)
    KINDS[kind](model, original)
    model.to(torch.bfloat16).save_pretrained(variant)
    for path in original.glob("tokenizer*"):
        shutil.copy(path, variant)


def copy_map(wmatrix: WMatrix) -> WMatrix:
    """The residual map that adds nothing to the source's states."""
    return replace(wmatrix, decode=0 * wmatrix.decode, bias=0 * wmatrix.bias)


if __name__ == "__main__":
    main()
