"""vLLM's own unit tests of KV connectors, as far as they fit one that only loads, and loads while
other requests run: rebuilt around our connector (docs/design.md lists them)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from v2_model import Gate, Memory, Served, request
from v2_stubs import Engine
from v2_worker import Rank, numbers, runs
from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector.connector import AwarenessConnector
from awareness_vllm.serving.params import passage_params

pytestmark = pytest.mark.unit

Serve = Callable[..., Served]
WAITING = RequestStatus.WAITING_FOR_REMOTE_KVS


def with_blocks(serve: Serve, overlapped: bool, blocks: int) -> Engine:
    served = serve()
    return Engine(served, [Rank(served)], blocks=blocks, overlapped=overlapped)


def waiting(engine: Engine, memory: Memory, name: str = "a", **fields: Any) -> tuple[Request, Gate]:
    """A request whose memory's file is read once the gate is open."""
    gate = Gate(engine.ranks[0].worker)
    one = request(name, memory, **fields)
    engine.add(one)
    engine.until(lambda: name in engine.ranks[0].worker.pending)
    assert one.status == WAITING
    return one, gate


def hashes(engine: Engine, one: Request) -> list[bool]:
    """Whether each of a request's blocks in the group without a window is in the prefix cache."""
    blocks = engine.scheduler.kv_cache_manager.get_blocks(one.request_id).blocks
    return [block.block_hash is not None for block in blocks[1]]


# The life of a load


def test_blocks_are_allocated_at_once_and_cached_when_they_are_written(engine: Engine) -> None:
    one, gate = waiting(engine, engine.served.memory(90))
    assert one not in engine.scheduler.running
    assert engine.free_blocks < engine.free
    assert hashes(engine, one) == [False] * 6
    scheduled = engine.step()
    assert scheduled is not None
    assert scheduled.total_num_scheduled_tokens == 0
    gate.open()
    engine.until(lambda: one.status == RequestStatus.RUNNING)
    # Five full blocks of the memory, and the one that the question has filled since, if it was.
    assert hashes(engine, one)[:5] == [True] * 5
    engine.finish()
    assert engine.ranks[0].first_sight("a") == ("59. 31m", "90m")


def test_loads_come_and_go_beside_requests_that_run(engine: Engine) -> None:
    engine.add(request("busy", answer=40))
    engine.until(lambda: engine.tokens.get("busy", 0) > 2)
    one, gate = waiting(engine, engine.served.memory(90))
    engine.add(request("other", answer=30))
    before = dict(engine.tokens)
    for _ in range(10):
        engine.step()
    assert one.status == WAITING
    assert engine.tokens["busy"] >= before["busy"] + 9
    gate.open()
    engine.finish()
    assert engine.tokens == {"busy": 40, "other": 30, "a": 3}


def test_nobody_finds_blocks_in_the_cache_that_are_not_written_yet(engine: Engine) -> None:
    """Two requests for one memory at once: each has blocks of its own."""
    one, gate = waiting(engine, engine.served.memory(90))
    other = request("b", engine.served.memories[0])
    engine.add(other)
    engine.until(lambda: "b" in engine.ranks[0].worker.pending)
    manager = engine.scheduler.kv_cache_manager
    (first, second) = (manager.get_block_ids(r.request_id)[1] for r in (one, other))
    assert not {*first} & {*second}
    gate.open()
    engine.finish()
    for name in "ab":
        assert engine.ranks[0].first_sight(name)[1] == "90m"


def test_a_prompt_that_is_a_memory_alone_computes_its_last_tokens(engine: Engine) -> None:
    engine.add(request("a", engine.served.memory(64), question=0))
    engine.finish()
    assert engine.ranks[0].first_sight("a") == ("25. 31m", "56m")
    assert engine.reports["a"]["awareness"]["loaded_tokens"] == 56


def test_a_load_that_finds_no_blocks_begins_when_there_are_some(
    serve: Serve, overlapped: bool
) -> None:
    engine = with_blocks(serve, overlapped, 21)
    engine.add(request("busy", question=100, answer=30))
    engine.until(lambda: engine.tokens.get("busy", 0) > 2)
    engine.add(request("a", engine.served.memory(96)))
    engine.step()
    assert engine.scheduler.requests["a"].status == RequestStatus.WAITING
    assert not engine.ranks[0].worker.pending
    engine.finish()
    assert engine.tokens == {"busy": 30, "a": 3}
    assert engine.ranks[0].first_sight("a") == ("65. 31m", "96m")


def preempt(engine: Engine, one: Request) -> None:
    """What vLLM's scheduler does to a request when the pool is full."""
    engine.scheduler.running.remove(one)
    engine.scheduler._preempt_request(one, 0.0)


def test_a_request_that_is_preempted_after_its_load_finds_it_in_the_cache(engine: Engine) -> None:
    one = request("a", engine.served.memory(90), question=6, answer=20)
    engine.add(one)
    engine.until(lambda: engine.tokens.get("a", 0) > 2)
    preempt(engine, one)
    engine.finish()
    assert engine.tokens == {"a": 20}
    # The last two of the memory were computed while there was no answer to compute instead.
    assert {runs(sight[1]).split()[0] for sight in engine.ranks[0].seen["a"]} == {"88m", "90m"}
    assert engine.reports["a"]["awareness"]["temperature"] == "hot"


def test_after_a_reset_of_the_prefix_cache_a_memory_is_loaded_anew(serve: Serve) -> None:
    """As after new weights in training: all that run are preempted, and resume in the same step.
    While a step is under way, vLLM refuses that."""
    served = serve()
    engine = Engine(served, [Rank(served)])
    one = request("a", engine.served.memory(90), answer=20)
    engine.add(one)
    engine.until(lambda: engine.tokens.get("a", 0) > 2)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.finish()
    assert engine.tokens["a"] == 20
    assert {runs(sight[1]).split()[0] for sight in engine.ranks[0].seen["a"]} == {"90m"}
    assert engine.reports["a"]["awareness"]["temperature"] == "warm"


# Captures of requests that are preempted: V2 hands them over as new ones


@pytest.mark.parametrize("retention", [0, None])
def test_a_capture_goes_on_after_a_preemption(
    serve: Serve, overlapped: bool, retention: int | None
) -> None:
    served = serve(retention=retention)
    rank = Rank(served)
    engine = Engine(served, [rank], overlapped=overlapped)
    rank.worker.captures.announce("key", "")
    one = request("c", question=150, capture="key")
    engine.add(one)
    engine.until(lambda: one.num_computed_tokens >= 128)
    preempt(engine, one)
    engine.finish()
    states = rank.worker.captures.collect("key")
    for i in range(Served.LAYERS):
        key, value = numbers(i, one.prompt_token_ids or [], 0, slice(None))
        assert torch.equal(states[tensor_name(i, "key")], key)
        assert torch.equal(states[tensor_name(i, "value")], value)


# Loads that fail


def test_after_a_failure_the_cache_holds_what_was_computed(engine: Engine) -> None:
    _, gate = waiting(engine, engine.served.memory(90), question=6)
    gate.error = RuntimeError("the disk is gone")
    gate.open()
    engine.finish()
    gate.error = None
    engine.add(request("b", engine.served.memories[0], question=6))
    engine.finish()
    assert engine.ranks[0].first_sight("b")[1] == "80n 8m"


def test_a_server_that_shall_fail_rather_than_compute_fails_that_request(
    serve: Serve, overlapped: bool
) -> None:
    served = serve()
    transfer = served.config.kv_transfer_config
    assert transfer is not None
    transfer.kv_load_failure_policy = "fail"
    engine = Engine(served, [Rank(served)], overlapped=overlapped)
    one, gate = waiting(engine, served.memory(90))
    engine.add(request("other"))
    gate.error = RuntimeError("the disk is gone")
    gate.open()
    engine.finish()
    assert one.status == RequestStatus.FINISHED_ERROR
    assert engine.tokens.get("a", 0) == 0
    assert engine.tokens["other"] == 3


def test_of_loads_that_fail_together_each_is_reported_once(engine: Engine) -> None:
    gate = Gate(engine.ranks[0].worker)
    gate.error = RuntimeError("the disk is gone")
    engine.add(*(request(name, engine.served.memory(64, seed=i)) for i, name in enumerate("abc")))
    engine.until(lambda: len(engine.ranks[0].worker.pending) == 3)
    gate.open()
    engine.finish()
    failed = [name for output in engine.outputs for name in output.failed_recving]
    assert sorted(failed) == ["a", "b", "c"]
    assert engine.tokens == dict.fromkeys("abc", 3)
    stats = [one.kv_connector_stats for one in engine.stats if one.kv_connector_stats]
    assert [reason for one in stats for reason in one["failures"]] == ["RuntimeError"] * 3


# Aborts


def test_the_servers_own_request_leaves_nothing_behind_when_it_is_aborted(engine: Engine) -> None:
    """The server gives a passage up that takes too long."""
    rank = engine.ranks[0]
    gate, memory = Gate(rank.worker), engine.served.memory(96)
    plan = passage_params(memory.part, (40, 60), "")
    engine.add(request("p", plan=plan, ids=memory.ids[:60], answer=1))
    engine.until(lambda: "p" in rank.worker.pending)
    engine.abort("p")
    engine.finish()
    gate.open()


# Between processes


@pytest.mark.slow  # another process imports vLLM
def test_a_steps_metadata_is_read_in_another_process(serve: Serve) -> None:
    served = serve()
    engine = Engine(served, [Rank(served)])
    one = request("a", engine.served.memory(90), capture="key")
    engine.add(one)
    scheduled = engine.scheduler.schedule()
    code = (
        "import pickle, sys; m = pickle.load(sys.stdin.buffer).kv_connector_metadata;"
        "(l,) = m.loads; print(l.request_id, l.begin, l.end, l.params.cache_salt)"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(scheduled),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert there.stdout.decode().split() == ["a", "0", "90", one.cache_salt]
    engine.abort("a")


def test_reports_and_statistics_reach_the_front_end(engine: Engine) -> None:
    """vLLM's front end is another process: what it is told travels as msgpack."""
    arrived: list[EngineCoreOutputs] = []
    take_up = engine.scheduler.update_from_output

    def send(*args: Any) -> dict[int, EngineCoreOutputs]:
        outputs = take_up(*args)
        for one in outputs.values():
            buffers = MsgpackEncoder().encode(one)
            arrived.append(MsgpackDecoder(EngineCoreOutputs).decode(buffers))
        return outputs

    engine.scheduler.update_from_output = send  # type: ignore[method-assign]
    engine.add(request("a", engine.served.memory(90)))
    engine.finish()
    (report,) = (o.kv_transfer_params for c in arrived for o in c.outputs if o.finish_reason)
    assert report == engine.reports["a"]
    stats = [c.scheduler_stats for c in arrived if c.scheduler_stats]
    sent = [s.kv_connector_stats for s in stats if s.kv_connector_stats]
    assert [load["tokens"] for one in sent for load in one["loads"]] == [90]
    assert AwarenessConnector.build_kv_connector_stats(sent[0]).reduce()["Memory loads"] == 1


# What vLLM asks of a connector's class


def test_vllm_keeps_its_hybrid_allocator_beside_the_connector(engine: Engine) -> None:
    config = engine.served.config
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is False
    assert supports_hma(engine.connector)
    assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == 2


def test_a_dropped_load_is_no_broken_promise(engine: Engine) -> None:
    """A connector that must deliver would make vLLM drop the tokens of a preempted request."""
    assert engine.scheduler.requires_kv_delivery is False
    assert engine.connector.get_finished_count() is None
    assert engine.scheduler.defer_block_free is engine.overlapped
