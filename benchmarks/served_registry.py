"""First answers from memories that were never local, beside local cold ones and the bare transfer.

    python benchmarks/served_registry.py --rounds 6 [--out FILE] [any flag of vllm serve]

SmolLM2's memories of 2,000 tokens on Gemma-3-270M, in a registry (Debian's `docker-registry` on
this machine). In each round, for every text in turn:

- *local*: its package lies in the server's store, and was never read by it;
- *registry*: the server's store and cache do not have it: looked up, pulled, loaded;
- *transfer*: the same lookup and pull alone, by a process that runs (this one), into a cache of its
  own.

Seconds are from a request to its answer of one token. Each load must be reported as a cold one: a
late one would measure native reading. Both ways must give the same token. Passes if the median from
the registry is within 1.5 times the local one plus the transfer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from awareness_demo.servers import AWARENESS, NAME, running
from first_token import TEXTS, question_about
from servers import ALIGNED, about, arguments, stretches

from awareness_vllm.marketplace.files import push_file
from awareness_vllm.models.hf import load_model
from awareness_vllm.oci.cache import Cache
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.packages.store import file_of
from awareness_vllm.serving.registry import RegistryMemories, pulled_folder
from awareness_vllm.trust.policy import TrustPolicy

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit"))
from registry_server import registry_server

FACTOR = 1.5
GIB = 2**30


@dataclass
class Bench:
    """A server of a store, and a registry that has all memories; `kept` has their files."""

    http: httpx.Client
    where: str
    kept: Path
    store: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cache = Cache(pulled_folder(self.where), limit=GIB)
        repository, own = open_repository(self.where), Cache(self.kept.parent / "own", limit=GIB)
        self.memories = RegistryMemories(repository, own, GIB, TrustPolicy())

    def prepare(self, memory: str, *, local: bool) -> None:
        """Have the server know nothing of a memory, whose file is a new one in its store, or
        nowhere but in the registry."""
        file = self.store / file_of(memory)
        if not file.exists():
            shutil.copy(self.kept / file.name, file)  # else what is dropped would be looked up
        self.http.delete(f"/v1/memories/{memory}").raise_for_status()
        file.unlink()
        self.cache.remove(file.name)
        if local:
            shutil.copy(self.kept / file.name, file)

    def ask(self, arm: str, memory: str, question: str) -> None:
        """One answer of one token, whose memory must have come by a cold load."""
        body = {"model": NAME, "prompt": question, "max_tokens": 1, "temperature": 0}
        body |= {"memory_ids": [memory], "cache_salt": os.urandom(8).hex()}
        began = time.perf_counter()
        response = self.http.post("/v1/completions", json=body)
        took = time.perf_counter() - began
        response.raise_for_status()
        answer = response.json()
        report = answer["memory"]
        if (report["plan"], report["temperature"]) != ("load", "cold"):
            raise RuntimeError(f"{arm}: {memory} was not loaded cold: {report}")
        self.seconds.setdefault(arm, []).append(took)
        self.tokens.add((question, answer["choices"][0]["text"]))

    def transfer(self, memory: str) -> None:
        self.memories.cache.remove(file_of(memory))
        began = time.perf_counter()
        self.memories.pull(self.memories.look(memory))
        self.seconds.setdefault("transfer", []).append(time.perf_counter() - began)

    def measure(self, texts: dict[str, str], rounds: int) -> None:
        """Every arm of every memory in every round, after one round that counts for nothing."""
        for number in range(rounds + 1):
            if number == 1:
                self.seconds.clear()
                self.tokens.clear()
            for memory, text in texts.items():
                question = question_about(text, number)
                # In turns: what the first one leaves in the machine's caches helps the other one.
                for local in (True, False) if number % 2 else (False, True):
                    self.prepare(memory, local=local)
                    self.ask("local" if local else "registry", memory, question)
                self.transfer(memory)


def figures(bench: Bench, size: int) -> dict[str, Any]:
    """Medians and ranges in milliseconds, and whether the bound holds."""
    median = {arm: statistics.median(values) for arm, values in bench.seconds.items()}
    bound = FACTOR * median["local"] + median["transfer"]
    questions = {question for question, _ in bench.tokens}
    return {
        "ms": {
            arm: {
                "median": round(1e3 * median[arm], 1),
                "range": [round(1e3 * min(values), 1), round(1e3 * max(values), 1)],
                "n": len(values),
            }
            for arm, values in bench.seconds.items()
        },
        "bound_ms": round(1e3 * bound, 1),
        "share_of_bound": round(median["registry"] / bound, 3),
        "package_bytes": size,
        "same_answers": len(bench.tokens) == len(questions),
        "passes": median["registry"] <= bound and len(bench.tokens) == len(questions),
    }


def captured(source: Path, texts: Sequence[str], folder: Path) -> dict[str, str]:
    """The texts by the IDs of a model's memories of them, which are put into a folder."""
    model = load_model(source)
    return {publish(capture(source, t, model=model), folder).stem: t for t in texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args, flags = arguments(parser)
    with (
        tempfile.TemporaryDirectory() as scratch,
        registry_server(Path(scratch) / "registry") as registry,
    ):
        folder, where = Path(scratch), registry.reference()
        (store := folder / "store").mkdir()
        stretched = stretches(args.target, [args.tokens] * TEXTS)
        texts = captured(args.source, stretched, folder / "kept")
        for memory in texts:
            push_file(folder / "kept" / file_of(memory), open_repository(where))
        flags += ["--store", str(store), "--wmatrix", str(args.wmatrix), "--registry", where]
        try:
            with running(AWARENESS, args.target, [*flags, *ALIGNED], folder / "log") as server:
                http = httpx.Client(base_url=server.url, timeout=300)
                bench = Bench(http, where, folder / "kept", store)
                bench.measure(texts, args.rounds)
        finally:
            shutil.rmtree(pulled_folder(where), ignore_errors=True)
        size = (folder / "kept" / file_of(next(iter(texts)))).stat().st_size
    found = figures(bench, size) | {"texts": TEXTS} | about(args)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    sys.exit(0 if found["passes"] else 1)


if __name__ == "__main__":
    main()
