"""One tenant's poison, and the answers of another before, during and after it.

The benchmark of that name asks more often, and compares with a server that never saw any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from harness import Server, serving
from victims import Answer, Ask, Household, Villain, answered, client_of, victims_requests

pytestmark = pytest.mark.engine

REQUESTS, TOKENS = 20, 3
PHASES = ("before", "during", "after")


@dataclass(frozen=True)
class Siege:
    """All answers by phase, and whoever asked for poison during the second."""

    answers: dict[str, list[Answer]]
    villain: Villain


@pytest.fixture(scope="module")
def household(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Household:
    return Household(tmp_path_factory.mktemp("victims"), smollm2)


@pytest.fixture(scope="module")
def server(household: Household, smollm2: Path) -> Iterator[Server]:
    household.poison_all()
    log = household.folder / "server.log"
    yield from serving(smollm2, household.store, log, *household.flags)


@pytest.fixture(scope="module")
def siege(server: Server, household: Household) -> Siege:
    villain = Villain(server.url, household)
    asks = victims_requests(household, REQUESTS, seed=0)
    answers = {}
    with client_of(server.url, "victim") as client:
        for phase in PHASES:
            if phase == "during":
                villain.thread.start()
            # Computed anew each time, into whatever blocks are free.
            anew = [replace(ask, salt=phase, tokens=TOKENS) for ask in asks]
            answers[phase] = [answered(client, ask) for ask in anew]
            if phase == "during":
                villain.leave()
    return Siege(answers, villain)


@pytest.mark.parametrize("phase", PHASES[1:])
def test_victims_get_the_answers_of_before(siege: Siege, phase: str) -> None:
    before = siege.answers["before"]
    assert not [answer.error for answer in before if answer.error]
    pairs = zip(before, siege.answers[phase], strict=True)
    assert [how for one, other in pairs if (how := one.differs(other))] == []


def test_no_poison_is_served(siege: Siege) -> None:
    assert siege.villain.rounds
    assert siege.villain.spoilt
    assert siege.villain.served == {}


def test_the_server_lives(siege: Siege, server: Server) -> None:
    assert server.process.poll() is None
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    with client_of(server.url, "villain") as client:
        assert not answered(client, Ask("In short,")).error
