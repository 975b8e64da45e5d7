"""Predict and time the operators beside what the machine can do, and beside plain torch.

    python benchmarks/kernels.py --out docs/figures/kernels.json
    python benchmarks/kernels.py --from docs/figures/kernels.json --plot docs/figures/kernels.png

For each pair's geometry (from configs; random weights of the right shape and scale) and each number
of tokens a row says what a cost model predicts; on a machine with CUDA also what was measured:
verified against the reference, then timed beside floors of the same run, a copy of as many bytes
and a bfloat16 product of as many operations. A number that could not be had is null and its row
says why; rows are written as they are made, so that a run that is cut off keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from kernel_benchmark import device
from kernel_benchmark.cases import PAGES
from kernel_benchmark.clock import peaks
from kernel_benchmark.predicted import ASSUMED, CARDS
from kernel_benchmark.rows import measure, measure_compiled, planned, stage
from kernel_benchmark.shapes import LARGE, PAIRS
from kernel_benchmark.verdicts import Document, plot, promised, summary, table


def run(args: argparse.Namespace) -> Document:
    """All rows, written to `args.out` whenever one is filled in."""
    # Those that the bars speak of come first: the time may be up before the others.
    jobs = sorted(itertools.product(args.pairs, args.tokens), key=lambda job: not promised(*job))
    torch.manual_seed(0)
    card = CARDS[args.card]
    with torch.inference_mode():
        if device.CUDA:
            card = peaks(card, args.repeats)
        document = device.machine() | {
            "measured": str(datetime.date.today()),
            "repeats": args.repeats,
            "pairs": {name: asdict(PAIRS[name]) for name in args.pairs},
            "peaks": asdict(card),
            "rows": [planned(*job, operation, card) for job in jobs for operation in PAGES],
        }
        write(document, args.out)
        if device.CUDA:
            fill(document, args)
    return document


def fill(document: Document, args: argparse.Namespace) -> None:
    """Measure row by row while there is time; compilers come last."""
    until = time.monotonic() + args.seconds
    for measured in (measure, measure_compiled):
        for i in range(0, len(document["rows"]), len(PAGES)):
            if time.monotonic() > until:
                return
            rows = document["rows"][i : i + len(PAGES)]
            for row in stage(rows, measured, args.repeats, until):
                print(json.dumps(row, ensure_ascii=False), flush=True)
                write(document, args.out)


def write(document: Document, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run may be killed while it writes.
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(LARGE))
    sizes = [1024, 4096, 8192, 16384]
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes)
    parser.add_argument("--card", choices=CARDS, default=ASSUMED, help="whose peaks are assumed")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after these")
    parser.add_argument("--out", type=Path, help="JSON to write; the plot goes beside it")
    parser.add_argument("--from", type=Path, dest="data", help="JSON of an earlier run")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    document = json.loads(args.data.read_text()) if args.data else run(args)
    lines = summary(document)
    print("\n".join([*lines, "", *table(document)]))
    data = args.data or args.out
    path = args.plot or (data and data.with_suffix(".png"))
    try:
        if path:
            plot(document, path)
    except ModuleNotFoundError as error:
        why = f"no plot: {error}; it can be drawn elsewhere by --from JSON --plot {path}"
        if args.plot:
            sys.exit(why)
        print(why)
    if any(line.startswith("wrong") for line in lines):
        sys.exit("what the kernels computed is wrong")


if __name__ == "__main__":
    main()
