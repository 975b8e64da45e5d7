"""Poison of one tenant, and the answers that other tenants get before, during and after it.

    python benchmarks/victims.py --requests 500

Two servers of SmolLM2 answer the same requests, plain and with memories, one after another. The
second also holds a store, W-Matrices and a disk cache that somebody poisons, and asks for all of
that meanwhile. It fails (status 1) where an answer differs from the first server's in its text, its
token ids or, by more than rounding, its log probabilities; where a poisoned memory is served; and
where the server stops answering. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from awareness_demo.anchors import held_out_dir
from awareness_demo.servers import AWARENESS, NAME, running
from poison import Poison, forged_maps, overwrite, packages, places, spoil_disk_cache, stranger
from servers import ALIGNED, machine, smollm2, stop_on_terminate

from awareness_vllm.anchors.corpus import load
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish

TOKENS, SECONDS = 4, 30.0
DEAD = 3
"""Requests without an answer after which no more are sent."""
ROUNDING = 1e-3
"""Nats. In float32 a prompt whose blocks were kept and one that is computed anew differ by less."""
SHARES = (0.2, 0.4, 0.2)
"""Of plain requests, of those with a copied memory, of those with a mapped one; the rest two."""


@dataclass(frozen=True)
class Ask:
    """A request of a victim. With a `salt` of its own it finds no blocks in the prefix cache."""

    prompt: str
    memories: tuple[str, ...] = ()
    salt: str = ""
    tokens: int = TOKENS

    @property
    def body(self) -> dict[str, Any]:
        named: dict[str, Any] = {"memory_ids": list(self.memories)} if self.memories else {}
        if self.salt:
            named["cache_salt"] = self.salt
        return {
            "model": NAME, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0,
            "ignore_eos": True, "logprobs": 5, "return_token_ids": True, **named,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer, or why there is none."""

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    error: str = ""

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        if response.status_code != 200:
            return cls(error=f"{response.status_code}: {response.text[:300]}")
        choice = response.json()["choices"][0]
        top = choice["logprobs"]["top_logprobs"]
        logprobs = tuple(value for at in top for _, value in sorted(at.items()))
        return cls(choice["text"], tuple(choice["token_ids"]), logprobs)

    def differs(self, other: Answer) -> str:
        """How another answer differs; empty where it is the same but for rounding."""
        for name in ("error", "text", "ids"):
            if (mine := getattr(self, name)) != (its := getattr(other, name)):
                return f"{name}: {mine!r} → {its!r}"[:300]
        gaps = [abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True)]
        worst = max(gaps, default=0.0)
        return "" if worst <= ROUNDING else f"log probabilities differ by {worst}"


@dataclass
class Household:
    """Two tenants' stores, the maps and the disk cache of one server; `good` are the victims'
    memories: two of the served model and one that a random map realigns. Once there is `poison`, it
    is in the villain's store."""

    folder: Path
    model: Path
    good: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    poison: list[Poison] = field(default_factory=list)
    unusable: list[Poison] = field(default_factory=list)
    """Forged maps that no server starts with."""

    def __post_init__(self) -> None:
        self.store, self.theirs = self.folder / "victims", self.folder / "villain"
        self.maps, self.disk = self.folder / "maps", self.folder / "disk"
        for folder in (self.theirs, self.maps, self.disk):
            folder.mkdir(parents=True)
        whole = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
        self.texts = [whole[n * 900 : n * 900 + 700] for n in range(8)]
        for text in self.texts[:2]:
            self.good.append(publish(capture(self.model, text), self.store).stem)
        package, wmatrix = stranger(self.model, self.texts[2], "honest")
        self.good.append(publish(package, self.store).stem)
        wmatrix.save(self.maps / "honest.wmatrix")
        self.tenants = self.folder / "tenants.json"
        self.tenants.write_text(
            json.dumps(
                {
                    "victims": {"api_keys": ["victim", "none"], "store": str(self.store)},
                    "villain": {"api_keys": ["villain"], "store": str(self.theirs)},
                }
            )
        )

    @property
    def flags(self) -> list[object]:
        """Flags of a float32 server of few blocks, which are used again and again, and of a warm
        tier that keeps one memory, so that the others come from the disk cache."""
        return [
            "--store", self.store, "--tenants", self.tenants,
            "--wmatrix", *sorted(self.maps.iterdir()), "--disk-cache", self.disk,
            "--host-cache-gib", 0, "--dtype", "float32", "--enforce-eager",
            "--kv-cache-memory-bytes", "256M", "--max-model-len", 1024, *ALIGNED,
        ]  # fmt: skip

    def poison_all(self) -> None:
        """Put poison of every kind where the villain, and the operator, can have put it."""
        copied, mapped = (self.store / f"{self.good[i]}.safetensors" for i in (0, 2))
        self.poison = packages(copied.read_bytes(), mapped.read_bytes(), self.theirs)
        self.poison += places(copied.read_bytes(), self.store, self.theirs)
        usable, self.unusable = forged_maps(self.model, self.texts[3], self.maps, self.theirs)
        self.poison += usable

    def replaceable(self) -> Path:
        """A good memory of the villain's own, to be overwritten once it has been checked."""
        return publish(capture(self.model, self.texts[4]), self.theirs)


def victims_requests(household: Household, count: int, seed: int) -> list[Ask]:
    """Plain requests, and requests with one or two memories."""
    rng = random.Random(seed)
    copies, mapped = household.good[:2], household.good[2]
    named: list[tuple[str, ...]] = [(), (copies[0],), (copies[1],), (mapped,), tuple(copies)]
    found = []
    for number in range(count):
        text = rng.choice(household.texts[5:])
        begin = rng.randrange(300)
        words = text[begin : begin + rng.randrange(80, 240)]
        found.append(Ask(f"{words}\n\n{number}. In short,", rng.choice(named)))
    return found


def client_of(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=SECONDS, headers={"Authorization": f"Bearer {key}"})


def answered(client: httpx.Client, ask: Ask) -> Answer:
    try:
        return Answer.of(client.post("/v1/completions", json=ask.body))
    except httpx.HTTPError as error:
        return Answer(error=repr(error))


@dataclass
class Villain:
    """Whoever asks for poison over and over, while others ask for theirs."""

    url: str
    household: Household
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    spoilt: int = 0
    rounds: int = 0
    slowest: float = 0.0
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.rng, self.stop = random.Random(1), threading.Event()
        self.salts = itertools.count()
        self.replaced = self.household.replaceable()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        try:
            self.poison()
        except Exception as error:
            self.failure = error

    def poison(self) -> None:
        with client_of(self.url, "villain") as client:
            self.ask(client, Poison("replaced: before", self.replaced.stem, harmless=True))
            overwrite(self.replaced)
            replaced = Poison("replaced between check and use", self.replaced.stem)
            while not self.stop.wait(0.5):
                for poison in [*self.household.poison, replaced]:
                    if self.stop.is_set():
                        return
                    self.ask(client, poison)
                    self.spoilt += spoil_disk_cache(self.household.disk, self.rng)
                self.rounds += 1

    def ask(self, client: httpx.Client, poison: Poison) -> None:
        """One request, whose memory is loaded each time."""
        ask = Ask("In short,", (poison.memory,), f"salt{next(self.salts)}")
        began = time.monotonic()
        try:
            response = client.post("/v1/completions", json=ask.body)
            status = str(response.status_code)
            if not all(map(math.isfinite, Answer.of(response).logprobs)):
                status += " of no numbers"
        except httpx.HTTPError as error:
            status = type(error).__name__
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.statuses.setdefault(poison.kind, Counter())[status] += 1

    def leave(self) -> None:
        """Stop, after a round at least; one who gave up before has shown nothing, and raises."""
        deadline = time.monotonic() + 10 * SECONDS
        while not self.rounds and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.stop.set()
        self.thread.join()
        if self.failure:
            raise self.failure

    @property
    def served(self) -> dict[str, dict[str, int]]:
        """Kinds of poison that were not refused each time."""
        harmless = {poison.kind for poison in self.household.poison if poison.harmless}
        harmless.add("replaced: before")
        return {
            kind: dict(counts)
            for kind, counts in self.statuses.items()
            if any(s[0] != "4" and not (s == "200" and kind in harmless) for s in counts)
        }


def asked(url: str, requests: list[Ask], villain: Villain | None = None) -> Iterator[Answer]:
    """The victims' answers, one after another; the villain is there for the middle half."""
    begin, end = len(requests) // 4, 3 * len(requests) // 4
    with client_of(url, "victim") as client:
        failed = 0
        for number, ask in enumerate(requests):
            if failed >= DEAD:
                yield Answer(error="not asked: the server does not answer any more")
                continue
            if villain and number == begin:
                villain.thread.start()
            if villain and number == end:
                villain.leave()
            answer = answered(client, ask)
            failed = failed + 1 if answer.error else 0
            yield answer
        if villain and not villain.stop.is_set():
            villain.leave()


def compared(control: list[Answer], poisoned: list[Answer]) -> dict[str, Any]:
    """How many answers are the same, and what is wrong with the first others."""
    differences = [one.differs(other) for one, other in zip(control, poisoned, strict=True)]
    wrong = [(number, what) for number, what in enumerate(differences) if what]
    exact = sum(one == other for one, other in zip(control, poisoned, strict=True))
    finite = all(math.isfinite(value) for answer in poisoned for value in answer.logprobs)
    return {
        "requests": len(control),
        "identical": len(control) - len(wrong),
        "identical_to_the_last_bit": exact,
        "unanswered_without_poison": sum(bool(answer.error) for answer in control),
        "log_probabilities_finite": finite,
        "different": [{"request": number, "how": what} for number, what in wrong[:10]],
    }


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both servers, one after the other."""
    model, log = smollm2(), args.log or scratch / "server.log"
    quiet = Household(scratch / "quiet", model)
    requests = victims_requests(quiet, args.requests, args.seed)
    with running(AWARENESS, model, quiet.flags, log) as server:
        began = time.monotonic()
        control = list(asked(server.url, requests))
        seconds = time.monotonic() - began
    loud = Household(scratch / "loud", model)
    assert loud.good == quiet.good
    loud.poison_all()
    with running(AWARENESS, model, loud.flags, log) as server:
        villain = Villain(server.url, loud)
        answers = list(asked(server.url, requests, villain))
        alive = not answers[-1].error
    result = compared(control, answers)
    ok = result["identical"] == len(requests) and not villain.served and alive
    return {
        "ok": ok and not result["unanswered_without_poison"],
        **result,
        "poison": {kind: dict(counts) for kind, counts in villain.statuses.items()},
        "maps_refused_at_start": [poison.kind for poison in loud.unusable],
        "poison_served": villain.served,
        "slowest_answer_to_poison_s": round(villain.slowest, 2),
        "rounds_of_poison": villain.rounds,
        "disk_cache_files_spoilt": villain.spoilt,
        "alive": alive,
        "seconds_without_poison": round(seconds, 1),
        "model": model.name,
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the servers' log stays")
    args = parser.parse_args()
    stop_on_terminate()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(args, Path(scratch))
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
