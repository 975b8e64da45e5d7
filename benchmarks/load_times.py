"""Predicted against measured: seconds of a load by temperature, on real servers of both models.

    awareness doctor --again
    python benchmarks/load_times.py [--forth FILE] [--back FILE] [--tokens 300 1000 2000 3000]

Predictions come from `awareness doctor`'s calibration and the geometries alone
(`compatibility.load_time.cost.load_times_s`), before a server is started. Measurements are the
`seconds` of `memory` in the server's responses, which vllm:awareness_load_seconds counts too; the
median of some rounds after a warm-up. Each memory is loaded through the W-Matrix and, captured on
the served model, as a copy; hot is another question about a memory that was just loaded.

Prints a Markdown table and the share of cases within 25 %, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from awareness_demo.anchors import held_out_dir
from awareness_demo.servers import AWARENESS, NAME, running
from servers import ALIGNED, demo, demo_map, machine, stop_on_terminate

from awareness_vllm.anchors.corpus import load
from awareness_vllm.compatibility.load_time.cost import load_times_s
from awareness_vllm.compatibility.load_time.speed import Calibration
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.serving.load_benchmark import calibrated
from awareness_vllm.wmatrix.manifest import read_manifest

TEMPERATURES = ("cold", "warm", "hot")
QUESTIONS = ("\n\nIn one sentence, this text is about", "\nThe author of it, as it says, was born")
WITHIN = 0.25
CPU_BLOCK = 128
FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "256M", "--max-model-len", "4096"]
"""Flags of a small cache, all of whose blocks are written before a load is timed."""


@dataclass(frozen=True)
class Direction:
    """The models that memories come from and go to; without a W-Matrix they are copies."""

    source: Path
    target: Path
    wmatrix: Path | None

    def __str__(self) -> str:
        return f"{self.source.name} → {self.target.name}" if self.wmatrix else self.target.name


@dataclass(frozen=True)
class Case:
    """One temperature of one memory in one direction."""

    direction: str
    tokens: int
    temperature: str
    predicted: float
    measured: float
    loaded: int

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted > 0)


def capture_text(model: Path, tokens: int, store: Path) -> str:
    """The ID of a memory of so many tokens of a held-out document."""
    whole = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    end = int(tokenize(load_tokenizer(str(model)), whole).spans[tokens, 0])
    file = store / "text.txt"
    file.write_bytes(whole.encode()[:end].decode(errors="ignore").encode())
    command = [*AWARENESS[:-1], "capture", "--model", model, "--text", file, "--store", store]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, check=True)
    return str(json.loads(done.stdout)["id"])


class Server:
    """A client of one server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=300)
        self.salts = 0

    def tokens(self, memory: str) -> int:
        """The tokens of a memory, by this server."""
        detail = self.http.get(f"/v1/memories/{memory}").raise_for_status().json()
        return int(detail["compatibility"]["prompt_tokens"])

    def ask(self, memory: str, question: str) -> dict[str, Any]:
        """The server's report of the load for a question."""
        body = {"model": NAME, "prompt": question, "max_tokens": 2, "temperature": 0}
        body |= {"memory_ids": [memory], "cache_salt": f"salt-{self.salts}"}
        answer = self.http.post("/v1/completions", json=body).raise_for_status()
        load: dict[str, Any] = answer.json()["memory"]
        return load

    def loads(self, memory: str) -> Iterator[dict[str, Any]]:
        """A cold load, a warm one and a hot one."""
        self.http.delete(f"/v1/memories/{memory}").raise_for_status()
        for temperature, question in zip(
            TEMPERATURES, (*QUESTIONS[:1] * 2, QUESTIONS[1]), strict=True
        ):
            self.salts += temperature != "hot"
            load = self.ask(memory, question)
            if load["temperature"] != temperature:
                raise RuntimeError(f"{memory} should be {temperature}: {load}")
            yield load


def cases(
    direction: Direction, server: Server, memory: str, store: Path, rounds: int, here: Calibration
) -> list[Case]:
    """One memory at all temperatures."""
    tokens = server.tokens(memory)
    predicted = load_times_s(
        geometry_of(direction.target),
        tokens,
        TargetConfig(block_size=CPU_BLOCK),
        here,
        package_bytes=(store / f"{memory}.safetensors").stat().st_size,
        wmatrix=read_manifest(direction.wmatrix) if direction.wmatrix else None,
    )
    results = [list(server.loads(memory)) for _ in range(rounds + 1)][1:]
    return [
        Case(
            str(direction),
            tokens,
            temperature,
            predicted[temperature],
            statistics.median(load["seconds"] for load in loads),
            loads[0]["loaded_tokens"],
        )
        for temperature, loads in zip(TEMPERATURES, zip(*results, strict=True), strict=True)
    ]


def measure(direction: Direction, tokens: list[int], rounds: int, here: Calibration) -> list[Case]:
    """All memories on one server: through the W-Matrix, then copies."""
    assert direction.wmatrix is not None
    copies = Direction(direction.target, direction.target, None)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        store.mkdir()
        memories = [
            (way, capture_text(way.source, count, store))
            for way in (direction, copies)
            for count in tokens
        ]
        flags = [*FLAGS, *ALIGNED, "--store", str(store), "--wmatrix", str(direction.wmatrix)]
        with running(AWARENESS, direction.target, flags, Path(scratch) / "log") as process:
            server = Server(process.url)
            return [
                case
                for way, memory in memories
                for case in cases(way, server, memory, store, rounds, here)
            ]


def table(results: list[Case]) -> str:
    """The cases in Markdown, and the share of predictions within 25 %."""
    rows = [
        f"| {c.direction} | {c.tokens} | {c.temperature} | {c.loaded} | {1e3 * c.predicted:.1f} ms "
        f"| {1e3 * c.measured:.1f} ms | {c.off:+.0%} |"
        for c in results
    ]
    good = sum(abs(c.off) <= WITHIN for c in results)
    return "\n".join(
        [
            "| | tokens | | loaded | predicted | measured | off |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"{good} of {len(results)} cases within {WITHIN:.0%}: {good / len(results):.0%}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forth", type=Path, help="SmolLM2 → Gemma-3; default: the demo's")
    parser.add_argument("--back", type=Path, help="Gemma-3 → SmolLM2; without it, one direction")
    parser.add_argument("--tokens", type=int, nargs="+", default=[300, 1000, 2000, 3000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    stop_on_terminate()
    smollm2, gemma3 = demo()
    ways = [Direction(smollm2, gemma3, args.forth or demo_map())]
    if args.back:
        ways.append(Direction(gemma3, smollm2, args.back))
    here = calibrated()
    results = [case for way in ways for case in measure(way, args.tokens, args.rounds, here)]
    print(table(results))
    about = {"rounds": args.rounds, "calibration": here.model_dump(mode="json")}
    print(json.dumps({"cases": [vars(case) for case in results], **about, **machine()}))


if __name__ == "__main__":
    main()
