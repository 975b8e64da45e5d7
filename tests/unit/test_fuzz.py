"""A small run of the fuzzer of files, and that its oracle sees what it is there for."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from fuzz.mutate import OVERWRITTEN, OWN_NAME, Mutant, mutant
from fuzz.oracle import REFUSED, SECONDS, SERVED, Oracle, Verdict
from fuzz.registry import KINDS, MAY
from fuzz.seeds import make_seeds
from fuzz.server import Server

from awareness_vllm.packages import file as package_file
from awareness_vllm.tensor_file import TensorFile

pytestmark = [pytest.mark.unit, pytest.mark.slow]

COUNT = 300


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    folder = tmp_path_factory.mktemp("fuzz")
    logging.disable(logging.CRITICAL)
    yield Oracle(Server(make_seeds(folder), folder))
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def files(oracle: Oracle) -> dict[str, bytes]:
    return oracle.seeds()


def of_kind(files: dict[str, bytes], kind: str, place: str = OWN_NAME) -> Mutant:
    """The first package with this mutation alone, at a place."""
    mutants = (mutant(0, number, files) for number in range(100_000))
    found = next(m for m in mutants if m.kinds == (kind,) and m.file == "package")
    return Mutant(0, found.seed, found.file, found.kinds, True, place, found.refuse, found.raw)


def faults(verdict: Verdict) -> dict[str, str]:
    """Without those of time and memory: these are for the benchmark, on a machine that does
    nothing else."""
    return {way: what for way, what in verdict.faults.items() if not what.startswith("takes")}


def test_mutants_are_refused_or_served_as_they_are(oracle: Oracle, files: dict[str, bytes]) -> None:
    numbers = dict.fromkeys(range(COUNT))
    for kind in KINDS:  # the first of each, wherever it comes
        numbers[next(n for n in count() if kind.name in mutant(0, n, files).kinds)] = None
    verdicts = [oracle.judge(mutant(0, number, files)) for number in numbers]
    assert {v.mutant.number: found for v in verdicts if (found := faults(v))} == {}
    outcomes = Counter(outcome for v in verdicts for outcome in v.ways.values())
    assert min(outcomes[REFUSED], outcomes[SERVED]) > COUNT
    assert {kind for v in verdicts for kind in v.mutant.kinds} == {kind.name for kind in KINDS}


def test_a_number_names_one_mutant(files: dict[str, bytes]) -> None:
    assert mutant(7, 11, files) == mutant(7, 11, files) != mutant(8, 11, files)


@pytest.mark.parametrize(
    ("name", "file"), [("wmatrix", "wmatrix"), ("int8", "wmatrix"), ("entry", "entry")]
)
def test_the_seeds_themselves_are_served(
    oracle: Oracle, files: dict[str, bytes], name: str, file: str
) -> None:
    verdict = oracle.judge(Mutant(0, name, file, (), True, OWN_NAME, MAY, files[name]))
    assert set(verdict.ways.values()) == {SERVED}


@pytest.mark.parametrize("name", ["latent", "latent in int8"])
def test_latents_are_served_wherever_no_states_are_asked_for(
    oracle: Oracle, files: dict[str, bytes], name: str
) -> None:
    mutant = Mutant(0, name, "package", (), True, OWN_NAME, MAY, files[name])
    memory = oracle.server.good[name]
    ways = oracle.server.package_ways(oracle.store(memory), memory)
    outcomes = {way: oracle.outcome(mutant, way, use) for way, use in ways.items()}
    assert outcomes.pop("packages.file.read") == REFUSED
    assert set(outcomes.values()) == {SERVED}


def test_the_oracle_sees_what_a_reader_lets_through(
    oracle: Oracle, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutants = [of_kind(files, "nan"), of_kind(files, "larger", OVERWRITTEN)]
    assert [faults(oracle.judge(one)) for one in mutants] == [{}, {}]
    monkeypatch.setattr(package_file, "check_finite", lambda *args, **kwargs: None)
    monkeypatch.setattr(TensorFile, "check_digest", lambda *args: None)
    assert all(faults(oracle.judge(one)) for one in mutants)


def test_the_oracle_counts_what_a_way_computes_and_not_what_it_waits(
    oracle: Oracle, files: dict[str, bytes]
) -> None:
    def computes() -> None:
        ends = time.process_time() + 1.5 * SECONDS
        while time.process_time() < ends:
            pass

    verdict = Verdict(Mutant(0, "wmatrix", "wmatrix", (), True, OWN_NAME, MAY, files["wmatrix"]))
    oracle.run(verdict, "waits", lambda: time.sleep(2 * SECONDS))
    oracle.run(verdict, "computes", computes)
    assert verdict.ways["waits"] == SERVED
    assert verdict.ways["computes"].startswith("takes 0.")


def test_the_oracle_sees_what_others_get(
    oracle: Oracle, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "good", [[torch.zeros(1)], oracle.good[1]])
    assert "good packages" in faults(oracle.judge(of_kind(files, "denormal")))
