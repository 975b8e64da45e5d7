"""Both directions' maps and the experiments with variants on a GPU that is lent for minutes.

    PYTHONPATH=.:kernels:demo python3 benchmarks/gpu_fit.py --models DIR --anchors DIR \
        --held-out DIR --out "$OUT" --minutes 3 2 2

Each phase leaves what it has under `--out`, so that a run that is killed costs the rest alone: maps
in int8, before calibration and about once a minute of it, `figures.json`, and what this prints in
`log.txt`. Figures are on half of the needles (even ones) and on held-out texts: good for choosing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Lengths differ from step to step: otherwise each needs other blocks of memory, up to all there is.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from held_out_figures import evaluate
from map_variants import compare

from awareness_vllm.anchors.corpus import load
from awareness_vllm.fit.calibrate import PARTS, mapped_logits
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.fit.reader import Reader
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

PAIR = ("smollm2-135m", "gemma3-270m")
LENGTHS = (300, 2000)
STARTED = time.perf_counter()


class Tee:
    """stderr, and a file that has all of it."""

    def __init__(self, path: Path) -> None:
        self.file, self.stream = path.open("a"), sys.stderr

    def write(self, text: str) -> int:
        self.file.write(text)
        self.file.flush()
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False


def say(line: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {line}", file=sys.stderr, flush=True)


def figures(out: Path, name: str, found: dict[str, Any]) -> None:
    """Add figures to `figures.json` under a name."""
    path = out / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: found}, indent=1))


def show(name: str, found: dict[str, Any]) -> None:
    """Print an evaluation as rows of a table."""
    for length, at in found.items():
        kept = "  ".join(f"{arm} {r['mean']:.3f}" for arm, r in at.get("retention", {}).items())
        facts = "  ".join(f"{arm} {share:.2f}" for arm, share in at["facts"].items())
        say(f"{name:24} {length:>5} tokens  retention: {kept}  facts: {facts}")
        for kind, shares in at["kinds"].items():
            row = "  ".join(f"{arm} {share:.2f}" for arm, share in shares.items())
            say(f"{'':24} {kind:>12}  {row}")


def direction(args: argparse.Namespace, number: int, minutes: float) -> None:
    """One direction's map: fitted, saved, evaluated before and after calibration."""
    source, target = PAIR if number == 0 else PAIR[::-1]
    name = f"{source}-to-{target}"
    config = FitConfig(
        tokens=args.tokens,
        rank=args.rank,
        calibration=args.lessons,
        batch=args.batch,
        minutes=minutes,
        rate=args.rate,
        device=args.device,
        workers=args.workers,
        lessons=args.kind,
    )
    seen = 0

    def snapshot(wmatrix: WMatrix) -> None:
        nonlocal seen
        path = args.out / (f"{name}.wmatrix" if seen else f"{name}.regression.wmatrix")
        seen += 1
        wmatrix.to_int8().save(path)
        say(f"saved {path.name}: {path.stat().st_size / 2**20:.1f} MiB")

    wmatrix = fit(
        args.models / source, args.models / target, load([args.anchors]), config, snapshot=snapshot
    )
    snapshot(wmatrix)
    judge(args, name, {"": wmatrix, ".regression": None})


def judge(args: argparse.Namespace, name: str, maps: dict[str, WMatrix | None]) -> None:
    """Evaluate a direction's maps, those that are None as they were saved."""
    reader = reader_of(args, name)
    for suffix, wmatrix in maps.items():
        wmatrix = wmatrix or load_wmatrix(args.out / f"{name}{suffix}.wmatrix")
        parts = {part: getattr(wmatrix.to(reader.device), part) for part in PARTS}
        mapped = functools.partial(mapped_logits, wmatrix.to(reader.device), reader, parts)
        found = {
            str(n): evaluate(reader, wmatrix, args.held_out, args.limits, n, {"memory": mapped})
            for n in LENGTHS
        }
        figures(args.out, f"{name}{suffix}", found)
        show(f"{name}{suffix}", found)


def reader_of(args: argparse.Namespace, name: str) -> Reader:
    """The reader of a direction's two models, on the run's device."""
    source, target = (args.models / part for part in name.split("-to-"))
    return Reader(source, target, 3, device=FitConfig(device=args.device).resolved().device)


def variants(args: argparse.Namespace, number: int, minutes: float) -> None:
    """The experiments of `map_variants.py` on the first direction's map."""
    name = "-to-".join(PAIR)
    saved = [args.out / f"{name}{suffix}.wmatrix" for suffix in ("", ".regression")]
    wmatrix = load_wmatrix(next(path for path in saved if path.exists()))
    args.minutes = minutes
    found = compare(reader_of(args, name), wmatrix, args.anchors, args, LENGTHS)
    figures(args.out, f"{name}.variants", found)
    show(f"{name}.variants", {str(n): found[str(n)] for n in LENGTHS})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=3, default=(3.0, 2.0, 2.0))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rank", type=int, default=576)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--lessons", type=int, default=10_000)
    parser.add_argument("--kind", choices=("short", "long"), default="long")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limits", type=int, nargs=2, default=(48, 96))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.stderr = Tee(args.out / "log.txt")  # type: ignore[assignment]
    say(f"torch {torch.__version__}, CUDA {torch.cuda.is_available()}, {sys.version.split()[0]}")
    status = 0
    for number, (phase, minutes) in enumerate(
        zip((direction, direction, variants), args.minutes, strict=True)
    ):
        if minutes <= 0:
            continue
        try:  # One that fails must not cost the others: the machine may not be had again.
            phase(args, number, minutes)
        except Exception:
            status = 1
            say(traceback.format_exc())
    return status


if __name__ == "__main__":
    sys.exit(main())
