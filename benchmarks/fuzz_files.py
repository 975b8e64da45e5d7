"""Read mutated packages, W-Matrices and disk-cache entries by all of the product's ways.

    python benchmarks/fuzz_files.py --count 10000

Each mutant must be refused with a typed error, or served with states that are finite and its own,
in 200 ms of the processor and 200 MB beyond its size, and change nothing about other files. Prints
one JSON document; status 1 where a mutant is not treated so. The same seed gives the same mutants.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fuzz.mutate import Mutant, mutant
from fuzz.oracle import BYTES, SECONDS, Oracle
from fuzz.seeds import make_seeds
from fuzz.server import Server

from awareness_vllm.provenance import hardware, versions

SHOWN = 3
PATIENCE = 60.0
"""Seconds for one mutant, in which all ways may hang."""
ADDRESS_SPACE = 2 * 2**30
"""Bytes that a worker may map beyond what it has at its start."""


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))


def work(results: Connection, seed: int, begin: int, end: int) -> None:
    """Judge some mutants; before each its number goes out, so that a crash has a name."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["AWARENESS_HOME"] = scratch  # seals and the key of the disk cache
        oracle = Oracle(Server(make_seeds(Path(scratch)), Path(scratch)))
        files = oracle.seeds()
        limit_memory()
        for number in range(begin, end):
            made = mutant(seed, number, files)
            results.send(("begin", describe(made)))
            verdict = oracle.judge(made)
            cost = {"seconds": verdict.seconds, "bytes": verdict.bytes, "served": verdict.served}
            results.send(("end", {**describe(made), **cost, "faults": verdict.faults}))
    results.send(("done", {}))


def describe(made: Mutant) -> dict[str, Any]:
    return {
        "number": made.number, "file": made.file, "seed": made.seed, "kinds": list(made.kinds),
        "signed": made.signed, "place": made.place,
    }  # fmt: skip


def judged(seed: int, count: int, first: int = 0) -> list[dict[str, Any]]:
    """The results of mutants, in order. A worker that dies or does not come back is replaced."""
    context = multiprocessing.get_context("fork")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        mine, its = context.Pipe(duplex=False)
        begin = first + len(rows)
        worker = context.Process(target=work, args=(its, seed, begin, first + count))
        worker.start()
        its.close()
        begun: dict[str, Any] = {}
        try:
            while mine.poll(PATIENCE):
                what, row = mine.recv()
                if what == "done":
                    break
                begun = row if what == "begin" else {}
                if what == "end":
                    rows.append(row)
            else:
                worker.kill()
        except EOFError:
            pass
        worker.join()
        if len(rows) < count:
            if not begun:
                raise RuntimeError(f"the worker stopped between mutants ({worker.exitcode})")
            fault = {"worker": f"dies ({worker.exitcode})"}
            rows.append({**begun, "seconds": 0.0, "bytes": 0, "served": False, "faults": fault})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind of mutation and outcome, and each kind of fault with its first mutants."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    faults: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        outcome = "faults" if row["faults"] else "served" if row["served"] else "refused"
        for kind in row["kinds"]:
            kinds[f"{row['file']}: {kind}"][outcome] += 1
        for way, what in row["faults"].items():
            place = "" if row["place"] == "under its own ID" else f" {row['place']}"
            kind = "+".join(row["kinds"]) if len(row["kinds"]) == 1 else "several"
            faults[f"{row['file']}{place} | {kind} | {way} | {what}"].append(row["number"])
    slowest, largest = (max(rows, key=lambda row: row[key]) for key in ("seconds", "bytes"))
    total = Counter(o for c in kinds.values() for o in c.elements())
    return {
        "mutants": len(rows),
        "by_file": dict(Counter(row["file"] for row in rows)),
        "refused_by_all": sum(not row["served"] and not row["faults"] for row in rows),
        "served_by_some": sum(row["served"] and not row["faults"] for row in rows),
        "with_faults": sum(bool(row["faults"]) for row in rows),
        "slowest": {k: slowest[k] for k in ("number", "kinds", "seconds")},
        "largest": {k: largest[k] for k in ("number", "kinds", "bytes")},
        "kinds": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "outcomes_by_kind": dict(total),
        "faults": {
            what: {"count": len(numbers), "first": numbers[:SHOWN]}
            for what, numbers in sorted(faults.items(), key=lambda item: -len(item[1]))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    args = parser.parse_args()
    began = time.monotonic()
    rows = judged(args.seed, args.count, args.first)
    result = {
        **summary(rows),
        "limits": {"seconds": SECONDS, "bytes_beyond_size": BYTES},
        "duration_s": round(time.monotonic() - began, 1),
        "seed": args.seed,
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["with_faults"] else 0)


if __name__ == "__main__":
    main()
