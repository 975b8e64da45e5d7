"""Loads that fail or are aborted, and ranks that differ, on CUDA's path through vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from v2_model import Gate, Memory, Served, request
from v2_stubs import Engine
from v2_worker import Rank, runs

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package

pytestmark = pytest.mark.unit

Serve = Callable[..., Served]

# Aborts


def test_a_request_is_aborted_while_its_file_is_read(engine: Engine) -> None:
    (rank,) = engine.ranks
    gate = Gate(rank.worker)
    engine.add(request("a", engine.served.memory(96)))
    engine.until(lambda: "a" in rank.worker.pending)
    for _ in range(3):
        engine.step()
    engine.abort("a")
    assert engine.free_blocks < engine.free  # a load may be under way
    engine.finish()
    gate.open()
    assert rank.seen == {}


def test_a_request_is_aborted_in_the_step_that_ends_its_load(engine: Engine) -> None:
    (rank,) = engine.ranks
    ended: list[str] = []

    def abort(output: Any) -> None:
        connected = output.kv_connector_output
        if connected is not None and connected.finished_recving:
            ended.extend(connected.finished_recving)
            engine.abort("a")

    engine.before_output = abort
    engine.add(request("a", engine.served.memory(96)))
    engine.finish()
    assert ended == ["a"]
    assert rank.seen == {}


def test_an_abort_and_the_end_of_the_load_meet_in_one_step(engine: Engine) -> None:
    (rank,) = engine.ranks
    gate = Gate(rank.worker)
    engine.add(request("a", engine.served.memory(96)))
    engine.until(lambda: "a" in rank.worker.pending)
    gate.open()
    engine.abort("a")
    engine.finish()
    assert [one.finished_recving for one in engine.outputs if one.finished_recving] == [{"a"}]


def test_a_request_is_aborted_between_its_load_and_its_first_step(engine: Engine) -> None:
    (rank,) = engine.ranks
    engine.add(request("a", engine.served.memory(96)))
    engine.until(lambda: engine.scheduler.finished_recving_kv_req_ids)
    engine.abort("a")
    engine.finish()
    engine.add(request("bb", engine.served.memories[0]))
    engine.finish()
    assert rank.first_sight("bb") == ("65. 31m", "96m")


# Failures


@pytest.mark.parametrize("busy", [False, True])
def test_a_failed_load_fails_nobody_else_and_is_computed(engine: Engine, busy: bool) -> None:
    (rank,) = engine.ranks
    gate = Gate(rank.worker)
    gate.error = RuntimeError("the disk is gone")
    if busy:
        engine.add(request("busy", answer=60))
    engine.add(request("a", engine.served.memory(96)))
    engine.until(lambda: "a" in rank.worker.pending)
    gate.open()
    engine.finish()
    assert rank.first_sight("a") == ("", "")
    assert runs(rank.seen["a"][1][1]) == ("63n" if busy else "64n")
    assert engine.reports["a"]["awareness"] == {
        "temperature": "recomputed",
        "reason": "RuntimeError",
    }
    assert [one.failed_recving for one in engine.outputs if one.failed_recving] == [{"a"}]
    assert not any(one.invalid_block_ids for one in engine.outputs)
    assert engine.tokens == {"a": 3, **({"busy": 60} if busy else {})}


def test_a_file_that_changed_on_disk_fails_its_load(engine: Engine) -> None:
    (rank,) = engine.ranks
    memory = engine.served.memory(96)
    path = engine.served.store / f"{memory.part.memory}.safetensors"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x01")
    engine.add(request("a", memory))
    engine.finish()
    assert rank.first_sight("a") == ("", "")
    assert engine.reports["a"]["awareness"]["reason"] == "PackageCorrupt"


def test_a_load_that_takes_too_long_is_given_up(serve: Serve, overlapped: bool) -> None:
    served = serve(load_timeout=0.05)
    rank = Rank(served)
    engine = Engine(served, [rank], overlapped=overlapped)
    gate = Gate(rank.worker)
    engine.add(request("a", served.memory(96)))
    begun = time.perf_counter()
    engine.until(lambda: "a" in rank.seen)
    assert time.perf_counter() - begun > 0.05
    assert rank.first_sight("a") == ("", "")
    # The file is read on: the next request finds it.
    rank.worker.load_timeout = 60.0
    gate.open()
    engine.add(request("bb", served.memories[0]))
    engine.finish()
    assert rank.first_sight("bb") == ("65. 31m", "96m")
    assert engine.reports["a"]["awareness"]["reason"] == "LoadTimeout"


def test_a_load_that_cannot_be_planned_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise RuntimeError("no plan")

    monkeypatch.setattr(engine.connector.scheduler, "plan_load", fail)
    engine.add(request("a", engine.served.memory(96)), request("other"))
    engine.finish()
    (rank,) = engine.ranks
    assert rank.first_sight("a") == ("", "")
    assert engine.tokens == {"a": 3, "other": 3}


# Tensor parallelism


def ranks_of(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """Two ranks with one KV head each, as vLLM's groups would number them."""
    made: list[Rank] = []
    for i in range(2):
        monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda i=i: i)
        monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_world_size", lambda: 2)
        made.append(Rank(served, i))
    return made


@pytest.fixture
def pair(serve: Serve, overlapped: bool, monkeypatch: pytest.MonkeyPatch) -> Engine:
    served = serve(heads=1)
    return Engine(served, ranks_of(served, monkeypatch), overlapped=overlapped)


def late(engine: Engine, memory: Memory) -> Gate:
    """Begin a load that the first rank ends, while the second one waits for its file."""
    gate = Gate(engine.ranks[1].worker)
    engine.add(request("a", memory))
    engine.until(lambda: engine.ranks[1].worker.pending and not engine.ranks[0].worker.pending)
    for _ in range(3):
        engine.step()
    assert not engine.scheduler.finished_recving_kv_req_ids
    return gate


def test_a_request_waits_for_the_load_of_all_ranks(pair: Engine) -> None:
    gate = late(pair, pair.served.memory(96))
    assert all(rank.seen == {} for rank in pair.ranks)
    gate.open()
    pair.finish()
    for rank in pair.ranks:
        assert rank.first_sight("a") == ("65. 31m", "96m")
    data = [stats.kv_connector_stats for stats in pair.stats if stats.kv_connector_stats]
    (load,) = (one for stats in data for one in stats["loads"])
    # Each rank wrote one head: two layers with all tokens, two with the two blocks of the window.
    assert load["bytes"] == 2 * (2 * 96 + 2 * 32) * 2 * Served.HEAD_DIM * 2


def test_one_ranks_failure_fails_the_load_on_all(pair: Engine) -> None:
    gate = late(pair, pair.served.memory(96))
    gate.error = RuntimeError("the disk is gone")
    gate.open()
    pair.finish()
    for rank in pair.ranks:
        assert rank.first_sight("a") == ("", "")
    assert pair.reports["a"]["awareness"]["temperature"] == "recomputed"


def test_an_abort_while_one_rank_still_loads_gives_all_blocks_back(pair: Engine) -> None:
    gate = late(pair, pair.served.memory(96))
    pair.abort("a")
    pair.finish()
    gate.open()


def test_each_rank_decodes_its_own_heads(
    serve: Serve,
    make_package: Callable[..., Package],
    geometry: Geometry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = serve(heads=1)
    served.map_from(geometry)
    memory = served.mapped(make_package(" ".join(str(37 * i) for i in range(40))))
    engine = Engine(served, ranks_of(served, monkeypatch))
    engine.add(request("a", memory))
    engine.finish()
    count = len(memory.ids)
    for rank in engine.ranks:
        assert rank.first_sight("a") == (f"{count - 31}. 31m", f"{count}m")
