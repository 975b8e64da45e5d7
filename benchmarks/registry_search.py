"""Searches of a layout folder with 10⁵ listings: the first one, which makes the index, then warm
ones, and the memory of a fresh process that searches.

    python benchmarks/registry_search.py --map maps/smollm2-135m--gemma3-270m.wmatrix

One in a hundred listings is a W-Matrix, the others are memories of both of the map's models and of
twenty more, each with the whole manifest of such a file. Layers are not there: no search reads any.
Every figure is of a process of its own; `peak_mb` is its largest resident set, imports included.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAPS = 100
"""One of so many listings is a W-Matrix."""
MODELS = 20
ROUNDS = 7
"""Times that each warm query is asked."""
DIGEST, SIZE, TOKENS, NAME, DESCRIPTION = 64 * "d", 987654321, 123454321, "NAME", "DESCRIPTION"
"""What stands in a template for the facts of a listing."""
PROSE = (
    "the of and to in for report annual meeting notes contract letter manual design review budget "
    "harbour bridge garden library museum engine battery turbine orchard glacier festival railway "
    "Köln Zürich Łódź résumé naïve 東京 protocol audit summary draft final appendix minutes survey"
)
WORDS = PROSE.split()
QUERIES: dict[str, dict[str, Any]] = {
    "everything": {},
    "rare words": {"text": "glacier orchard turbine"},
    "a word of most": {"text": "report"},
    "words cut short": {"text": "rep gla"},
    "no such word": {"text": "zzzzz"},
    "source": {"source_model": "model-7"},
    "target": {"target_model": "gemma3-270m"},
    "target by a folder's fingerprint": {"target_model": "model-3"},
    "tokens": {"tokens": (1990, 2000)},
    "all at once": {
        "text": "annual report",
        "source_model": "smollm2-135m",
        "target_model": "gemma3-270m",
        "tokens": 4000,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--map", type=Path, required=True, help="a certified W-Matrix to imitate")
    parser.add_argument("--listings", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="for the layout (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="also write the figures to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(CHILDREN[args.child], args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        report = json.dumps(run(args), indent=2, ensure_ascii=False)
        print(report, flush=True)
        if args.out:
            args.out.write_text(report + "\n")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.provenance import hardware

    begin = time.perf_counter()
    write(args.map, args.listings, args.folder)
    written = time.perf_counter() - begin
    index = args.folder / "layout" / "index.json"
    children = {name: child(name, args.folder) for name in CHILDREN}
    caches = (args.folder / "home" / "cache" / "listings").glob("*.sqlite")
    return {
        "listings": args.listings,
        "written_s": round(written, 1),
        "index_json_mb": round(index.stat().st_size / 1e6, 1),
        "database_mb": round(sum(path.stat().st_size for path in caches) / 1e6, 1),
        **children,
        "hardware": hardware(),
        "python": sys.version.split()[0],
    }


def write(wmatrix: Path, count: int, folder: Path) -> None:
    """A layout of so many listings, whose index is written once."""
    from awareness_vllm.oci.artefact import MANIFEST
    from awareness_vllm.oci.layout import Layout
    from awareness_vllm.oci.reference import Reference

    layout = Layout(Reference.parse(folder / "layout"))
    blobs = folder / "layout" / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def manifests() -> Iterator[tuple[bytes, str, str]]:
        for artefact, tag in artefacts(wmatrix, count):
            for content in (artefact.config, artefact.document):
                (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)
            yield artefact.document, MANIFEST, tag

    layout.put_manifests(manifests())


def artefacts(wmatrix: Path, count: int) -> Iterator[tuple[Any, str]]:
    """Artefacts like those of real files, each with its tag. Their JSON is that of a listing of the
    same models with other facts put in."""
    from awareness_vllm.oci.artefact import Artefact, Descriptor, Layer
    from awareness_vllm.packages import listing as package
    from awareness_vllm.packages.manifest import Manifest
    from awareness_vllm.wmatrix import listing as maps
    from awareness_vllm.wmatrix.manifest import read_manifest

    certified = read_manifest(wmatrix)
    models = [certified.source, certified.target]
    for i in range(MODELS):
        update = {"name": f"model-{i}", "weights": hashlib.sha256(bytes([i])).hexdigest()}
        models.append(models[i % 2].model_copy(update=update))
    versions = {"torch": "2.13.0", "vllm": "0.32.0"}
    memories = [
        template(
            package.PackageListing,
            manifest=Manifest(
                geometry=model, tokens=TOKENS, engine="vllm", versions=versions, payload=DIGEST
            ),
        )
        for model in models
    ]
    pairs = itertools.permutations(models, 2)
    joined = [
        (ends, template(maps.WMatrixListing, manifest=certified.model_copy(update=ends)))
        for ends in ({"source": a, "target": b} for a, b in itertools.islice(pairs, 3 * MODELS))
    ]
    dice = random.Random(0)
    for i in range(count):
        digest = hashlib.sha256(f"layer {i}".encode()).hexdigest()
        size = dice.randrange(1 << 20, 1 << 28)
        facts = {DIGEST: digest, str(SIZE): str(size), NAME: phrase(dice, 4)}
        facts |= {DESCRIPTION: phrase(dice, 20), str(TOKENS): str(dice.randrange(16, 8192))}
        if i % MAPS == 0:
            kind: Any = maps
            ends, config = joined[0] if i == 0 else dice.choice(joined)
            tag = f"{maps.pair_of(**ends)}.{digest[:16]}"
        else:
            kind, config, tag = package, dice.choice(memories), f"mem_{digest[:32]}"
        for known, fact in facts.items():
            config = config.replace(known, fact)
        layer = Descriptor(media_type=kind.LAYER, digest=f"sha256:{digest}", size=size)
        yield Artefact(kind.ARTEFACT, kind.CONFIG, config.encode(), [Layer(b"", layer)]), tag


def template(kind: Any, **facts: Any) -> str:
    """A listing in JSON, in which other facts can be put."""
    listing = kind(digest=DIGEST, bytes=SIZE, label=NAME, description=DESCRIPTION, **facts)
    document: str = listing.model_dump_json()
    return document


def phrase(dice: random.Random, words: int) -> str:
    """Some words, the first ones of WORDS far more often."""
    return " ".join(WORDS[int(len(WORDS) * dice.random() ** 2)] for _ in range(words))


def first(folder: Path) -> dict[str, Any]:
    """The search that makes the index."""
    return {"s": round(seconds(lambda: market(folder).memories.search("report")), 2)}


def fresh(folder: Path) -> dict[str, Any]:
    """A process that searches once, as `awareness search` does."""
    return {"s": round(seconds(lambda: market(folder).memories.search("annual report")), 3)}


def warm(folder: Path) -> dict[str, Any]:
    """All queries, again and again."""
    offered = market(folder)
    times = {}
    for name, query in QUERIES.items():
        found = offered.memories.search(**query)
        all = [seconds(lambda q=query: offered.memories.search(**q)) for _ in range(ROUNDS)]
        times[name] = {
            "median_ms": round(1e3 * statistics.median(all), 1),
            "most_ms": round(1e3 * max(all), 1),
            "found": len(found),
        }
    maps = [seconds(lambda: offered.wmatrices.search("report")) for _ in range(ROUNDS)]
    times["W-Matrices"] = {"median_ms": round(1e3 * statistics.median(maps), 1)}
    return {"queries": times, "most_s": round(max(t["median_ms"] for t in times.values()) / 1e3, 3)}


def changed(folder: Path) -> dict[str, Any]:
    """A listing by its ID; then a search after one more was tagged: `index.json` is read again."""
    offered = market(folder)
    (listing,) = offered.memories.search(limit=1)
    by_id = seconds(lambda: offered.memories.get(listing.id))
    _, raw = offered.repository.manifest(listing.id)
    from awareness_vllm.oci.artefact import MANIFEST

    push = seconds(lambda: offered.repository.put_manifest(raw, MANIFEST, "one-more"))
    after = seconds(lambda: offered.memories.search("one-more"))
    return {"get_s": round(by_id, 2), "push_s": round(push, 2), "search_s": round(after, 2)}


CHILDREN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "first": first,
    "fresh": fresh,
    "warm": warm,
    "changed": changed,
}


def market(folder: Path) -> Any:
    from awareness_vllm.marketplace.market import Marketplace

    return Marketplace(folder / "layout")


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measured(measure: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    figures = measure(folder)
    # Not getrusage, which counts what the parent had when it forked.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {**figures, "cpu_s": round(time.process_time(), 2), "peak_mb": round(peak / 1e6)}


def child(name: str, folder: Path) -> dict[str, Any]:
    """The figures of a process of its own, whose wall time counts imports, too."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--map", "-"]
    environment = {**os.environ, "AWARENESS_HOME": str(folder / "home")}
    begin = time.perf_counter()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    wall = time.perf_counter() - begin
    figures: dict[str, Any] = json.loads(result.stdout)
    return {**figures, "process_s": round(wall, 2)}


if __name__ == "__main__":
    main()
