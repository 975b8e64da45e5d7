"""Fuzz the readers of packages and W-Matrices by coverage, with atheris.

    pip install -e '.[fuzz]'
    python benchmarks/fuzz_atheris.py --seconds 120

Bytes go through header, manifest and the whole file, as a package and as a W-Matrix. Only typed
errors may come of them, and finite numbers; anything else stops the run, status 1, and the bytes
stay in the folder of findings. The corpus begins with the seeds of `fuzz_files.py`, and a quarter
of the mutations are of its kinds. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN, OURS = "run", 0.25
EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def readers(folder: Path) -> Any:
    """The function that libFuzzer calls, its readers instrumented."""
    import atheris

    with atheris.instrument_imports(include=["awareness_vllm"]):
        from awareness_vllm.errors import AwarenessError
        from awareness_vllm.packages import file as package
        from awareness_vllm.packages import manifest as package_manifest
        from awareness_vllm.wmatrix import file as wmatrix
        from awareness_vllm.wmatrix import manifest as wmatrix_manifest

    def read(data: bytes) -> None:
        (path := folder / "input").write_bytes(data)
        ways = (
            package_manifest.read_manifest, package.read, package.read_index, package.verify,
            wmatrix_manifest.read_manifest, wmatrix.load,
        )  # fmt: skip
        for way in ways:
            try:
                result = way(path)
            except AwarenessError:
                continue
            for states in [*getattr(result, "keys", []), *getattr(result, "values", [])]:
                assert states.isfinite().all(), "states that are not finite"

    return read


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's own mutation, or one of ours, with the payload digest of its tensors: without it
    few come past the checks."""
    import atheris
    from fuzz.mutate import KINDS, STRANGE, apply

    rng = random.Random(seed)
    try:
        changed = apply(rng, data, [rng.choice(KINDS)], True) if rng.random() < OURS else None
    except STRANGE:
        changed = None  # an input that has no such parts any more
    return changed if changed and len(changed) <= most else atheris.Mutate(data, most)


def fuzz(flags: list[str]) -> None:
    """This process becomes the fuzzer."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        read = readers(Path(folder))
        atheris.Setup([sys.argv[0], *flags], read, custom_mutator=mutated)
        atheris.Fuzz()


def write_corpus(folder: Path) -> None:
    """The seeds."""
    from fuzz.oracle import Oracle
    from fuzz.seeds import make_seeds
    from fuzz.server import Server

    scratch = folder.parent
    for name, raw in Oracle(Server(make_seeds(scratch), scratch)).seeds().items():
        (folder / name.replace(" ", "-")).write_bytes(raw)


def main() -> None:
    if sys.argv[1:2] == [RUN]:
        return fuzz(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["AWARENESS_HOME"] = scratch
        (corpus := Path(scratch) / "corpus").mkdir()
        write_corpus(corpus)
        flags = [
            f"-max_total_time={args.seconds}", f"-seed={args.seed}", "-max_len=20000",
            "-timeout=5", "-rss_limit_mb=3000", "-print_final_stats=1",
            f"-artifact_prefix={args.findings}/", str(corpus),
        ]  # fmt: skip
        command = [sys.executable, __file__, RUN, *flags]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    executions, coverage = EXECUTIONS.search(done.stderr), COVERAGE.findall(done.stderr)
    blocks, features, inputs = map(int, coverage[-1]) if coverage else (0, 0, 0)
    result = {
        "ok": done.returncode == 0,
        "executions": int(executions[1]) if executions else 0,
        "coverage": {"blocks": blocks, "features": features, "corpus": inputs},
        "seconds": args.seconds,
        "findings": sorted(path.name for path in args.findings.iterdir()),
        "end": "" if done.returncode == 0 else done.stderr[-3000:] + done.stdout[-2000:],
    }
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
