"""What may come of a mutant: a typed error, or states that are finite, plausible and its own."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory, realign
from awareness_vllm.errors import AwarenessError
from awareness_vllm.kernels import largest
from awareness_vllm.packages.file import AnyPackage, Package
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.wmatrix.file import WMatrix
from fuzz import registry
from fuzz.container import Container
from fuzz.mutate import ENTRY, FOLDER, HOLE, INT8, LINK, OTHER_NAME, OVERWRITTEN, PIPE, Mutant
from fuzz.server import Server, Way

SECONDS, BYTES, HANG = 0.2, 200 * 2**20, 2.0
"""The processor's seconds and bytes that a way may take; seconds after which it hangs."""
LARGEST = largest(torch.bfloat16)
REFUSED, SERVED = "refused", "served"
HEADER_ONLY = ("packages.manifest.read_manifest", "wmatrix.manifest.read_manifest",
               "awareness inspect", "serve with a quality target")  # fmt: skip
LISTINGS = ("awareness list", "Registry.read")
OF_SERVERS = ("serve", "serve on CUDA")
BY_ID = ("MemoryResolver.resolve", *OF_SERVERS)


class Hang(BaseException):
    """A way that takes longer than HANG; nothing that catches exceptions may catch it."""


@dataclass
class Verdict:
    """A mutant's results: of each way REFUSED, SERVED or what is wrong; the largest cost of one."""

    mutant: Mutant
    ways: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def faults(self) -> dict[str, str]:
        return {way: what for way, what in self.ways.items() if what not in (REFUSED, SERVED)}

    @property
    def served(self) -> bool:
        """Whether any way but a listing serves it."""
        return any(what == SERVED for way, what in self.ways.items() if way not in LISTINGS)


def rss_peak() -> int:
    """The process's largest resident set since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def rss_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def states_of(result: Any) -> list[Tensor]:
    """All floats that a way would serve."""
    if isinstance(result, (Package, AlignedMemory)):
        return [*result.keys, *result.values]
    if isinstance(result, LatentPackage):
        return [result.rows()]
    if isinstance(result, WMatrix):
        parts = [result.mean, result.scale, result.encode, result.decode, result.bias]
        return [*parts, *result.sink_keys, *result.sink_values]
    return []


def ids_of(result: Any) -> list[int]:
    if isinstance(result, (Package, LatentPackage)):
        return result.tokens
    return result.ids if isinstance(result, (AlignedMemory, ResolvedMemory)) else []


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit."""
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in pairs
    )


def near(one: list[Tensor], other: list[Tensor]) -> bool:
    """But for rounding."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.05) for a, b in pairs)


@dataclass
class Oracle:
    """The judge of mutants, with a server of its own and what it serves of good files."""

    server: Server

    def __post_init__(self) -> None:
        self.good = self.spoken()
        self.entry_path = self.server.entry_path
        self.entry_bytes = self.entry_path.read_bytes()
        entry = self.server.disk.get(self.server.entry)
        assert entry is not None
        self.entry = [*entry.keys, *entry.values]
        self.room = self.server.folder / "mutants"
        self.room.mkdir()

    def seeds(self) -> dict[str, bytes]:
        """The seeds' bytes, as `mutate.mutant` takes them."""
        files = {kind: self.store(name).read_bytes() for kind, name in self.server.good.items()}
        maps = {"wmatrix": self.server.map.read_bytes(), INT8: self.server.int8.read_bytes()}
        return {**files, **maps, ENTRY: self.entry_bytes}

    def store(self, memory: str) -> Path:
        return self.server.store / f"{memory}.safetensors"

    def spoken(self) -> list[list[Tensor]]:
        """What the server makes of its good packages."""
        return [states_of(self.server.serve(self.server.good[k])) for k in ("copied", "mapped")]

    def judge(self, mutant: Mutant) -> Verdict:
        """A mutant by all ways, and the good packages after it."""
        verdict = Verdict(mutant)
        path, ways = self.place(mutant)
        try:
            for name, way in ways.items():
                self.run(verdict, name, way)
            if not all(map(same, self.spoken(), self.good)):
                verdict.ways["good packages"] = "others are served differently"
        finally:
            remove(path)
        return verdict

    def place(self, mutant: Mutant) -> tuple[Path, dict[str, Way]]:
        """The mutant's file where its ways look for it."""
        server = self.server
        if mutant.file == ENTRY:
            self.entry_path.write_bytes(mutant.raw)
            return self.entry_path, {"DiskTier.get": lambda: server.disk.get(server.entry)}
        if mutant.file == registry.WMATRIX:
            path = self.room / "mutant.wmatrix"
            path.write_bytes(mutant.raw)
            return path, server.wmatrix_ways(path)
        digest = hashlib.sha256(mutant.raw).hexdigest()[:32]
        memory = f"mem_{digest[::-1] if mutant.place == OTHER_NAME else digest}"
        path = self.store(memory)
        if mutant.place == OVERWRITTEN:
            return self.overwritten(mutant)
        if mutant.place == PIPE:
            os.mkfifo(path)
        elif mutant.place == FOLDER:
            path.mkdir()
        elif mutant.place == LINK:
            (aside := self.room / "aside").write_bytes(mutant.raw)
            path.symlink_to(aside)
        else:
            path.write_bytes(mutant.raw)
            if mutant.place == HOLE:
                os.truncate(path, 2**40)
        return path, server.package_ways(path, memory)

    def overwritten(self, mutant: Mutant) -> tuple[Path, dict[str, Way]]:
        """A good file that the front end has checked, then the mutant's bytes in its place, with
        the size and the times of before. Only the two halves of the server look at it."""
        good = self.store(self.server.good[mutant.seed]).read_bytes()
        raw = good.replace(b"a memory", b"A MEMORY", 1)
        memory = f"mem_{hashlib.sha256(raw).hexdigest()[:32]}"
        (path := self.store(memory)).write_bytes(raw)
        try:
            part, stat = self.server.plan(self.server.resolver, memory), path.stat()
        except AwarenessError:
            return path, {}
        path.write_bytes(mutant.raw[: len(raw)].ljust(len(raw), b"\0"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return path, {"MemoryLoader": lambda: self.server.load(part)}

    def run(self, verdict: Verdict, name: str, way: Way) -> None:
        """One way, its outcome and what it cost: the processor's seconds, on which other processes
        of the machine have less of a hold. A slow one has two more tries."""
        seconds = math.inf
        for _ in range(3):
            reset_peak()
            before, began = rss_now(), time.process_time()
            outcome = self.outcome(verdict.mutant, name, way)
            seconds = min(seconds, time.process_time() - began)
            used = rss_peak() - before - len(verdict.mutant.raw)
            if seconds <= SECONDS or outcome == "hangs":
                break
        if outcome in (REFUSED, SERVED):
            outcome = f"takes {seconds:.2f} s" if seconds > SECONDS else outcome
            outcome = f"takes {used / 2**20:.0f} MiB" if used > BYTES else outcome
        verdict.ways[name] = outcome
        verdict.seconds = max(verdict.seconds, seconds)
        verdict.bytes = max(verdict.bytes, used)

    def outcome(self, mutant: Mutant, name: str, way: Way) -> str:
        try:
            with alarm(HANG):
                result = way()
        except AwarenessError as error:
            # A message goes into a log and over HTTP.
            return REFUSED if len(str(error)) < 10_000 else "refused in a message of 10 kB or more"
        except Hang:
            return "hangs"
        except Exception as error:
            return f"untyped {type(error).__name__}: {str(error)[:100]!r}"
        if mutant.file == ENTRY:
            return self.of_entry(result)
        return self.fault(mutant, name, result) or SERVED

    def of_entry(self, result: AlignedMemory | None) -> str:
        """A disk-cache entry counts as missing, or is what was written."""
        self.entry_path.write_bytes(self.entry_bytes)
        if result is None:
            return REFUSED
        return SERVED if same(states_of(result), self.entry) else "an altered entry is served"

    def fault(self, mutant: Mutant, name: str, result: Any) -> str | None:
        """What is wrong with what a way would serve."""
        if name in LISTINGS:
            return None if self.listed(name, result) else "a listing lacks the good files"
        if must_refuse(mutant, name):
            return (
                f"serves what {mutant.refuse} may"
                if mutant.refuse != registry.MAY
                else (f"serves a file that is {mutant.place}")
            )
        for states in states_of(result):
            if not states.is_floating_point():
                return f"serves states of {states.dtype}"
            states = states.float()
            if not bool(states.isfinite().all()):
                return "serves states that are not finite"
            if states.numel() and float(states.abs().max()) > LARGEST and not_map(result):
                return f"serves states beyond {LARGEST:g}"
        if any(type(one) is not int or one < 0 for one in ids_of(result)):
            return "serves ids that are none"
        if mutant.place == OVERWRITTEN:
            return "serves what was written after the check"
        return None if self.own(mutant, name, result) else "serves states that are not its own"

    def listed(self, name: str, result: Any) -> bool:
        if name != "awareness list":
            return True
        rows = {row["id"]: row["error"] for row in result["memories"]}
        return all(rows.get(memory, "") is None for memory in self.server.good.values())

    def own(self, mutant: Mutant, name: str, result: Any) -> bool:
        """Whether what is served is what the file says, by a reader that checks nothing."""
        if not isinstance(result, (Package, LatentPackage, AlignedMemory, WMatrix)):
            return True
        try:
            file = Container.parse(mutant.raw)
            parts = {name: part.tensor for name, part in file.parts.items()}
        except (ValueError, KeyError, TypeError, RuntimeError):
            return False
        if isinstance(result, WMatrix):
            names = ["mean", "scale", "encode", "decode", "bias"]
            for name, dim in (("encode", 1), ("decode", 0)):
                if (scale := parts.get(f"{name}_scale")) is not None:  # int8
                    parts[name] = (parts[name] * scale.unsqueeze(dim)).bfloat16()
            for part in ("key", "value"):
                names += [f"sink.{i}.{part}" for i in range(len(result.sink_keys))]
            return same(states_of(result), [parts[name] for name in names])
        if mutant.file == registry.WMATRIX:
            return True  # the good package through a map of its own: compared by its tensors
        document = file.document
        if "latent" in parts:
            return self.own_latent(Manifest.model_validate(document), parts, result)
        layers = range(len(document["geometry"]["layers"]))
        keys, values = ([parts[f"layers.{i}.{p}"] for i in layers] for p in ("key", "value"))
        if isinstance(result, Package) or result.ids == parts["tokens"].tolist():
            return same(states_of(result), [*keys, *values])
        text, spans = bytes(parts["text"].numpy()).decode(), parts["spans"].numpy()
        manifest = Manifest.model_validate(document)
        package = Package(manifest, text, parts["tokens"].tolist(), spans, keys, values)
        memory = self.realigned(package)
        if name == "serve on CUDA":  # the kernels round elsewhere
            return result.ids == memory.ids and near(states_of(result), states_of(memory))
        return result.ids == memory.ids and same(states_of(result), states_of(memory))

    def realigned(self, package: AnyPackage) -> AlignedMemory:
        seeds = self.server.seeds
        return realign(
            package, seeds.wmatrix, seeds.target, lambda i: seeds.embedding[i], dtype=torch.bfloat16
        )

    def own_latent(self, manifest: Manifest, parts: dict[str, Tensor], result: Any) -> bool:
        """`own` of a latent package; its decoding rounds alike everywhere but in the kernels."""
        text, spans = bytes(parts["text"].numpy()).decode(), parts["spans"].numpy()
        stored = {name: part for name, part in parts.items() if name.startswith("latent")}
        tokens = parts["tokens"].tolist()
        package = LatentPackage(manifest, text, tokens, spans, stored)
        if isinstance(result, LatentPackage):
            return same([result.rows()], [package.rows()])
        memory = self.realigned(package)
        return result.ids == memory.ids and near(states_of(result), states_of(memory))


def not_map(result: Any) -> bool:
    """Whether LARGEST is a bound on what is served: maps are judged by what they make."""
    return not isinstance(result, (WMatrix, Package, LatentPackage))


def must_refuse(mutant: Mutant, name: str) -> bool:
    """Whether a way may not serve a mutant, whatever it makes of it."""
    if mutant.place in (LINK, OTHER_NAME, HOLE) and name in BY_ID:
        return True
    if mutant.refuse == registry.MAY:
        return False
    if mutant.refuse == registry.ALWAYS:
        return True
    if mutant.refuse == registry.CONTENT:
        return name not in HEADER_ONLY
    return name in OF_SERVERS


def remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
