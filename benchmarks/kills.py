"""Kills (SIGKILL) at random moments of captures, publishes, fits, disk-cache writes and map saves.

    python benchmarks/kills.py --kills 200 [--seed 0] [--out FILE.json]

The process forks for each kill: the child works in a folder until it dies, on two random models of
some ten thousand parameters. Then whatever is listed must be whole, and the next command, in
another child, must succeed and leave nothing of the dead one behind. `in_a_write` counts the kills
that left a draft: only these could have left half a file. The status is 1 where anything failed.
"""

# Forked from a process with threads, a child may wait for ever for what they held.
import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
}

import argparse
import datetime
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forks import forked, status_of
from killed_work import KINDS, Kind, prepare

from awareness_vllm.provenance import hardware, versions

ROUND = 10
"""Kills after which a kind starts in an empty folder again."""
DRAFTS = (".draft-", ".tmp")
"""How the names of drafts begin: of our folders, and of safetensors' own files."""


def leftovers(folder: Path) -> list[str]:
    """The files in a folder that are drafts, or in one."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(f) for f in files if any(part.startswith(DRAFTS) for part in f.parts))


def run_and_wait(work: Callable[[], None], log: Path) -> str:
    """What went wrong in a child, "" where nothing did."""
    status = status_of(forked(work, log))
    return "" if status == 0 else f"status {status}: {log.read_text()[-2000:]}"


def endless(kind: Kind, folder: Path, seed: int) -> None:
    """A kind's work again and again, until the kill."""
    rng = random.Random(seed)
    while True:
        kind.work(folder, rng)


class Killer:
    """Kills of one kind of work. `problems` are what a user would call a fault."""

    def __init__(self, kind: Kind, root: Path, rng: random.Random) -> None:
        self.kind, self.root, self.rng = kind, root, rng
        self.kills, self.in_a_write = 0, 0
        self.problems: list[str] = []
        self.log = root / "log"
        self._start_anew()
        began = time.perf_counter()
        os.environ["AWARENESS_HOME"] = str(self.home)
        if problem := run_and_wait(lambda: kind.work(self.folder, random.Random(0)), self.log):
            raise SystemExit(f"{kind.name} fails undisturbed: {problem}")
        self.span = 1.5 * (time.perf_counter() - began)

    def kill(self) -> None:
        """Kill the work at a random moment, look at what is left, and go on."""
        if self.kills % ROUND == 0:
            self._start_anew()
        os.environ["AWARENESS_HOME"] = str(self.home)
        child = forked(lambda: endless(self.kind, self.folder, self.rng.randrange(2**32)), self.log)
        time.sleep(self.rng.uniform(0, self.span))
        os.kill(child, signal.SIGKILL)
        status = status_of(child)
        self.kills += 1
        self.in_a_write += bool(self._leftovers())
        if status != -signal.SIGKILL:
            self._note(f"it ended before the kill: {self.log.read_text()[-2000:]}")
        for half in self.kind.broken(self.folder):
            self._note(f"not whole: {half}")
        if problem := run_and_wait(lambda: self.kind.next(self.folder), self.log):
            self._note(f"the next command failed: {problem}")
        if left := self._leftovers():
            self._note(f"left over after the next command: {left}")

    def report(self) -> dict[str, Any]:
        return {"kills": self.kills, "in_a_write": self.in_a_write, "problems": self.problems}

    def _note(self, problem: str) -> None:
        self.problems.append(f"kill {self.kills}: {problem}")

    def _leftovers(self) -> list[str]:
        return leftovers(self.folder) + leftovers(self.home)

    def _start_anew(self) -> None:
        """Go on in empty folders: one to work in, and a home."""
        scratch = Path(tempfile.mkdtemp(dir=self.root, prefix=f"{self.kind.name}-"))
        self.folder, self.home = scratch / "work", scratch / "home"
        self.folder.mkdir()


def all_kills(kills: int, seed: int, root: Path) -> Iterator[Killer]:
    """The killers of all kinds, once each has done its share of the kills."""
    rng = random.Random(seed)
    prepare(root)
    killers = [Killer(kind, root, rng) for kind in KINDS]
    for number in range(kills):
        killers[number % len(killers)].kill()
    yield from killers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report here, too")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="awareness-kills-") as root:
        os.environ["AWARENESS_HOME"] = str(Path(root) / "home")
        killers = list(all_kills(args.kills, args.seed, Path(root)))
    kinds = {killer.kind.name: killer.report() for killer in killers}
    report = {
        "kills": sum(kind["kills"] for kind in kinds.values()),
        "in_a_write": sum(kind["in_a_write"] for kind in kinds.values()),
        "problems": sum(len(kind["problems"]) for kind in kinds.values()),
        "kinds": kinds,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - began, 1),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }
    document = json.dumps(report, indent=1)
    print(document)
    if args.out:
        args.out.write_text(document + "\n")
    raise SystemExit(bool(report["problems"]))


if __name__ == "__main__":
    main()
