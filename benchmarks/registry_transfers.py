"""Push and pull of packages by several processes at once, some of them killed, and how fast.

    python benchmarks/registry_transfers.py [--packages 64 --tokens 2000 --processes 4 --kills 50]
        [--rounds 3] [--seed 0] [--folder DIR] [--out FILE.json]

A real registry (Debian's `docker-registry`) serves on a loopback port. The packages have random
states in the geometry of SmolLM2-135M, 23 KB a token.

1. Kills: processes push their share of the packages, then pull it, and one of them at a time is
   killed (SIGKILL) at a random moment and begins again. After each kill, what is visible is whole:
   every tag in the registry has its config and its layer, every package in the store its digest.
   In the end everything is there, in the registry's own files too.
2. Speed, each figure over all bytes and from all processes at once, into files that are on the disk
   (fsync) before they have their names:
   - copy: over a loopback TCP socket, from a process that reads the file to one that writes it,
     1 MiB at a time, nothing looked at;
   - get: GET of the blobs from the registry by `http.client`, nothing verified;
   - pull: as `awareness pull` does it, into an empty home.
   Each round measures all of them, one after another; `ratio` is pull / copy, of the medians.

The status is 1 where anything was lost, or half there.
"""

from __future__ import annotations

# Forked from a process with threads, a child may wait for ever for what they held.
import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import datetime
import hashlib
import http.client
import json
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from forks import forked, status_of

from awareness_vllm.errors import ArtefactNotFound, AwarenessError
from awareness_vllm.marketplace.files import pull_file, push_file
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import DIGEST
from awareness_vllm.oci.remote import Remote
from awareness_vllm.oci.transfer import look
from awareness_vllm.provenance import hardware, versions

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit"))
from registry_server import RegistryServer, registry_server

CHUNK = 1 << 20
LONGEST_WAIT = 0.3
"""Seconds between two kills, at most."""
Work = Callable[[], None]
LookAround = Callable[[list[str]], set[str]]
"""Appends the faults that it sees, and returns the IDs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files lie (default: TMPDIR)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        paths = make_packages(root / "author", args.packages, args.tokens, args.seed)
        total = sum(path.stat().st_size for path in paths)
        print(f"{len(paths)} packages, {total / 2**20:.0f} MiB", flush=True)
        with registry_server(root / "registry") as server:
            transfers = Transfers(root, paths, args.processes, server, args.seed)
            kills = {"push": args.kills // 2, "pull": args.kills - args.kills // 2}
            killed = [transfers.killed(what, count) for what, count in kills.items()]
            speed = transfers.speed(args.rounds)
            not_yet = transfers.not_yet
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions() | {"registry": "Distribution 2.8, filesystem storage"},
        "packages": len(paths),
        "bytes": total,
        "processes": args.processes,
        "kills": killed,
        "tags_listed_before_they_lead_anywhere": not_yet,
        "speed": speed,
    }
    show(result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(kind["faults"] for kind in killed))


def show(result: dict[str, Any]) -> None:
    for kind in result["kills"]:
        print(
            f"{kind['what']}: {kind['kills']} kills in {kind['turns']} turns, "
            f"{kind['looks']} looks at visible files; faults: {kind['faults'] or 'none'}"
        )
    for name, mib in result["speed"]["mib_per_s"].items():
        print(f"{name:6} {mib:7.0f} MiB/s")
    print(f"pull / copy {result['speed']['ratio']:.2f}")


def make_packages(folder: Path, count: int, tokens: int, seed: int) -> list[Path]:
    """Packages of random states, in the real format; not sealed."""
    import torch

    from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
    from awareness_vllm.packages.file import build, publish

    layer = LayerGeometry(
        heads=3, head_dim=64, positions=Positions(scheme="rope", theta=1e5, rotary_dim=64)
    )
    geometry = Geometry(
        name="smollm2-135m",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=576,
        vocab_size=49152,
        max_positions=8192,
        layers=(layer,) * 30,
        weights="w" * 64,
        tokenizer="t" * 64,
    )
    ends = np.arange(1, tokens + 1, dtype=np.int64)
    spans = np.stack((ends - 1, ends), axis=1)
    paths = []
    for i in range(count):
        generator = torch.Generator().manual_seed(seed * count + i)
        shape = (60, tokens, 3, 64)
        states = list(torch.randn(shape, generator=generator).bfloat16())
        package = build(
            geometry=geometry,
            text="x" * tokens,
            tokens=[1] * tokens,
            spans=spans,
            keys=states[:30],
            values=states[30:],
            engine="transformers",
            versions={"torch": torch.__version__},
        )
        paths.append(publish(package, folder, sealed=False))
    return paths


class Transfers:
    """Packages, a registry, and the shares of them that a process each has."""

    def __init__(
        self, root: Path, paths: Sequence[Path], processes: int, server: RegistryServer, seed: int
    ) -> None:
        self.root, self.server, self.rng = root, server, random.Random(seed)
        self.digests = {path.stem: digest_of(path) for path in paths}
        self.shares = [paths[i::processes] for i in range(processes)]
        self.reference = server.reference("bench/turn0")
        self.log = root / "log"
        self.not_yet = 0

    def killed(self, what: str, kills: int) -> dict[str, Any]:
        """Pushes or pulls with so many kills, in as many turns as that takes, each from nothing."""
        result: dict[str, Any] = {"what": what, "kills": 0, "looks": 0, "turns": 0, "faults": []}
        while result["kills"] < kills or not result["turns"]:
            turn = f"{what}{result['turns']}"
            result["turns"] += 1
            os.environ["AWARENESS_HOME"] = str(self.root / turn)
            done, store = self.root / turn / "done", self.root / turn / "store"
            done.mkdir(parents=True)
            if what == "push":
                self.reference = self.server.reference(f"bench/{turn}")
                works = [partial(push_share, share, self.reference, done) for share in self.shares]
                look_around = self.in_registry
            else:
                works = [
                    partial(pull_share, share, self.reference, store, done) for share in self.shares
                ]
                look_around = partial(self.in_store, store)
            self._turn(works, kills, look_around, result)
            seen = look_around(result["faults"])
            if seen != self.digests.keys():
                result["faults"].append(f"{turn}: {len(seen)} of {len(self.digests)} are there")
            result["faults"] += self.stored() if what == "push" else leftovers(self.root / turn)
            shutil.rmtree(self.root / turn)
        return result

    def _turn(
        self, works: Sequence[Work], kills: int, look_around: LookAround, result: dict[str, Any]
    ) -> None:
        """A process for each work, which begins again when it is killed, until all are done."""
        running = {forked(work, self.log): work for work in works}
        while running:
            time.sleep(self.rng.uniform(0.01, LONGEST_WAIT))
            victim = self.rng.choice(sorted(running)) if result["kills"] < kills else 0
            for child, work in list(running.items()):
                if child == victim:
                    os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0 if child == victim else os.WNOHANG)
                if not ended:
                    continue
                del running[child]
                if (code := os.waitstatus_to_exitcode(status)) == -signal.SIGKILL:
                    result["kills"] += 1
                    result["looks"] += len(look_around(result["faults"]))
                    running[forked(work, self.log)] = work
                elif code:
                    result["faults"].append(self.log.read_text()[-2000:])

    def in_registry(self, faults: list[str]) -> set[str]:
        """The memories that others see in the registry, each with all that belongs to it.

        Distribution makes a tag's folder, which its list of tags is made of, before the link in it
        that says which manifest it is: until then the tag is listed, and its memory not there.
        """
        repository = open_repository(self.reference)
        assert isinstance(repository, Remote)
        seen = set()
        for tag in repository.tags():
            try:
                (layer,) = look(repository, tag).manifest.layers
                seen.add(tag)
                blob = repository.session.request("HEAD", f"blobs/{layer.digest}")
                if int(blob.headers["Content-Length"]) != layer.size:
                    faults.append(f"{tag}: {dict(blob.headers)}")
            except ArtefactNotFound as error:
                if DIGEST.search(str(error)):  # of a blob: what is visible is half there
                    faults.append(f"{tag}: {error}")
                self.not_yet += 1
            except (AwarenessError, ValueError) as error:
                faults.append(f"{tag}: {error}")
        return seen

    def in_store(self, store: Path, faults: list[str]) -> set[str]:
        """The memories that others see in a store, each with the bytes that it should have."""
        seen = {path.stem for path in store.glob("mem_*.safetensors")}
        for name in seen:
            if digest_of(store / f"{name}.safetensors") != self.digests.get(name):
                faults.append(f"{name}: other bytes in the store")
        return seen

    def stored(self) -> list[str]:
        """What is wrong with the registry's own files."""
        blobs = self.server.folder / "storage/docker/registry/v2/blobs/sha256"
        found = {path.parent.name: digest_of(path) for path in blobs.glob("*/*/data")}
        wrong = [name for name, digest in found.items() if name != digest]
        return wrong + [name for name, digest in self.digests.items() if digest not in found]

    def speed(self, rounds: int) -> dict[str, Any]:
        """MiB/s of all ways, the median of some rounds, and each round's."""
        ways = {"copy": self.copies, "get": self.gets, "pull": self.pulls}
        total = sum(path.stat().st_size for share in self.shares for path in share) / 2**20
        measured: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(rounds):
            for name, way in ways.items():
                folder = self.root / f"{name}{i}"
                os.environ["AWARENESS_HOME"] = str(folder)
                (folder / "store").mkdir(parents=True)
                os.sync()  # what was written before is not waited for now
                measured[name].append(total / self._timed(way(folder / "store")))
                faults: list[str] = []
                assert self.in_store(folder / "store", faults) == self.digests.keys()
                assert not faults, faults
                shutil.rmtree(folder)
        medians = {name: statistics.median(values) for name, values in measured.items()}
        return {
            "mib_per_s": medians,
            "rounds": measured,
            "ratio": medians["pull"] / medians["copy"],
        }

    def _timed(self, works: Sequence[Work]) -> float:
        """Seconds that a process for each work takes, from when all are there."""
        reading, writing = os.pipe()

        def waiting(work: Work) -> None:
            os.close(writing)
            os.read(reading, 1)
            work()

        children = [forked(partial(waiting, work), self.log) for work in works]
        time.sleep(0.2)
        begin = time.perf_counter()
        os.close(writing)
        statuses = [status_of(child) for child in children]
        seconds = time.perf_counter() - begin
        os.close(reading)
        assert not any(statuses), self.log.read_text()
        return seconds

    def copies(self, store: Path) -> Iterator[Work]:
        for share in self.shares:
            listener = socket.create_server(("127.0.0.1", 0))
            yield partial(send, share, listener)
            yield partial(receive, share, listener, store)

    def gets(self, store: Path) -> Iterator[Work]:
        for share in self.shares:
            blobs = {path: f"sha256:{self.digests[path.stem]}" for path in share}
            yield partial(get, blobs, self.reference, store)

    def pulls(self, store: Path) -> Iterator[Work]:
        for share in self.shares:
            yield partial(pull_share, share, self.reference, store)


def push_share(share: Sequence[Path], reference: str, done: Path) -> None:
    repository = open_repository(reference)
    for path in share:
        if not (done / path.name).exists():
            push_file(path, repository)
            (done / path.name).touch()


def pull_share(
    share: Sequence[Path], reference: str, store: Path, done: Path | None = None
) -> None:
    repository = open_repository(reference)
    for path in share:
        if done is None or not (done / path.name).exists():
            pull_file(repository, path.stem, store)
            if done is not None:
                (done / path.name).touch()


def send(share: Sequence[Path], listener: socket.socket) -> None:
    buffer = memoryview(bytearray(CHUNK))
    with listener.accept()[0] as connection:
        for path in share:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    connection.sendall(buffer[:count])


def receive(share: Sequence[Path], listener: socket.socket, store: Path) -> None:
    with socket.create_connection(listener.getsockname()) as connection:
        for path in share:
            write(connection.recv_into, path.stat().st_size, store / path.name)


def get(blobs: Mapping[Path, str], reference: str, store: Path) -> None:
    host, _, repository = reference.removeprefix("oci://").partition("/")
    connection = http.client.HTTPConnection(host)
    for path, digest in blobs.items():
        connection.request("GET", f"/v2/{repository}/blobs/{digest}")
        response = connection.getresponse()
        write(response.readinto, path.stat().st_size, store / path.name)
        response.read()


def write(receive_into: Callable[[memoryview], int], size: int, path: Path) -> None:
    """Write so many bytes; they are on the disk before they have their name."""
    buffer, draft = memoryview(bytearray(CHUNK)), path.with_suffix(".draft")
    with draft.open("wb", buffering=0) as file:
        while size:
            count = receive_into(buffer[: min(CHUNK, size)])
            assert count, "the sender has stopped"
            file.write(buffer[:count])
            size -= count
        os.fsync(file.fileno())
    draft.replace(path)


def leftovers(home: Path) -> list[str]:
    """What is in a home beside whole files: drafts, and parts of downloads."""
    files = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "done"]
    return [str(path) for path in files if path.suffix not in (".safetensors", ".used")]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
