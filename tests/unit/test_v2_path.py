"""The connector on CUDA's path: driven by vLLM's own scheduler and Model Runner V2's own pieces.

V2 starts asynchronous loads after a step's forward pass, outside of any forward context, and its
scheduler may be a step ahead. Each pass of the stubbed model checks what all layers can see.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from v2_model import Gate, Memory, Served, request
from v2_stubs import Engine, Rank, numbers, runs

from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector.kv_layout import pages_of
from awareness_vllm.serving.params import LoadParams, passage_params

pytestmark = pytest.mark.unit

Serve = Callable[..., Served]


@pytest.fixture(params=[False, True], ids=["in_step", "a_step_ahead"])
def overlapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def engine(serve: Serve, overlapped: bool) -> Engine:
    served = serve()
    return Engine(served, [Rank(served)], overlapped=overlapped)


def cached_states(rank: Rank, blocks: tuple[list[int], ...]) -> torch.Tensor:
    """All states in a request's blocks, copied."""
    return torch.cat(
        [
            state.flatten()
            for name, group in rank.groups.items()
            for state in rank.states(name, blocks[group])
        ]
    )


# Loads


def test_a_memory_comes_in_steps_without_a_forward(engine: Engine) -> None:
    (rank,) = engine.ranks
    engine.add(request("a", engine.served.memory(96)))
    engine.finish()
    assert rank.first_sight("a") == ("65. 31m", "96m")
    # The first two computed tokens, at 116 and 117, see the question and the memory's end.
    assert runs(rank.seen["a"][2][0]) == "86. 10m 21n"
    assert engine.tokens == {"a": 3}
    assert engine.reports["a"]["awareness"]["loaded_tokens"] == 96
    assert rank.events.index("forward") > rank.events.index("get_transfer_results")


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLHNC"])
def test_pages_are_where_flash_attention_reads_them(serve: Serve, layout: str) -> None:
    served = serve(layout=layout)
    memory, rank = served.memory(64), Rank(served)
    engine = Engine(served, [rank])
    engine.add(request("a", memory))
    engine.until(lambda: "a" in rank.rows)
    for i, (name, layer) in enumerate(rank.layers.items()):
        blocks = rank.rows["a"].blocks[rank.groups[name]]
        pages = pages_of(layer)
        assert layer.kv_cache.data_ptr() == pages.keys.data_ptr()
        # The last two blocks of the memory are in every layer's window.
        for paged, states in ((pages.keys, memory.keys[i]), (pages.values, memory.values[i])):
            assert torch.equal(paged[blocks[2:4]].flatten(0, 1), states[32:64])
    engine.finish()


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "full_graph"])
def test_beside_another_request_a_load_is_written_after_the_forward(
    serve: Serve, graphs: bool, overlapped: bool
) -> None:
    served = serve()
    rank = Rank(served, graphs=graphs)
    engine = Engine(served, [rank], overlapped=overlapped)
    engine.add(request("busy", answer=100))
    engine.until(lambda: engine.tokens.get("busy", 0) > 3)
    gate = Gate(rank.worker)
    engine.add(request("a", served.memory(96)))
    engine.until(lambda: "a" in rank.worker.pending)
    blocks = engine.scheduler.kv_cache_manager.get_block_ids("a")
    before = cached_states(rank, blocks)
    rank.events.clear()
    for _ in range(5):
        engine.step()
    assert torch.equal(cached_states(rank, blocks), before)
    order = ["forward", "start_load_kv", "wait_for_save", "get_transfer_results"]
    assert rank.events == order * 5
    gate.open()
    engine.until(lambda: "a" in rank.seen)
    assert rank.first_sight("a") == ("65. 31m", "96m")
    engine.finish()
    assert engine.tokens == {"busy": 100, "a": 3}


@pytest.mark.parametrize(("retention", "hot"), [(None, True), (0, False)])
def test_the_prefix_cache_and_a_load_of_what_it_lacks_make_one_memory(
    serve: Serve, overlapped: bool, retention: int | None, hot: bool
) -> None:
    served = serve(retention=retention)
    rank = Rank(served)
    engine = Engine(served, [rank], overlapped=overlapped)
    memory = engine.served.memory(90)
    engine.add(request("a", memory))
    engine.finish()
    engine.add(request("bb", memory))
    engine.finish()
    assert rank.first_sight("bb") == ("59. 31m", "90m")
    report = engine.reports["bb"]["awareness"]
    # Of layers with a window, vLLM keeps by default only what the same prompt would need.
    expected = ("hot", 10) if hot else ("warm", 90)
    assert (report["temperature"], report["loaded_tokens"]) == expected


def test_memories_in_a_batch_do_not_mix(engine: Engine) -> None:
    (rank,) = engine.ranks
    memories = [engine.served.memory(40 + 16 * i, seed=i) for i in range(4)]
    engine.add(*(request("abcd"[i], memory) for i, memory in enumerate(memories)), request("e"))
    engine.finish()
    for i, name in enumerate("abcd"):
        assert rank.first_sight(name)[1] == f"{40 + 16 * i}m"
    assert engine.tokens == dict.fromkeys("abcde", 3)


def test_a_step_of_vllm_itself_is_none_of_the_connectors(engine: Engine) -> None:
    """While it warms up and captures graphs, vLLM switches its driver of the connector off."""
    (rank,) = engine.ranks
    engine.add(request("a", engine.served.memory(64)))
    rank.driver.set_disabled(True)
    engine.step()
    assert rank.events == []
    rank.driver.set_disabled(False)


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


# Captures and passages


def test_a_capture_is_read_back_after_the_forward_of_each_step(engine: Engine) -> None:
    (rank,) = engine.ranks
    rank.worker.captures.announce("key", "")
    one = request("c", question=150, capture="key")
    engine.add(one)
    engine.finish()
    states = rank.worker.captures.collect("key")
    for i in range(Served.LAYERS):
        for part, expected in zip(
            ("key", "value"), numbers(i, one.prompt_token_ids or [], 0, slice(None)), strict=True
        ):
            assert torch.equal(states[tensor_name(i, part)], expected)


def test_a_passage_is_read_back_and_laid_over_later_loads(engine: Engine) -> None:
    (rank,) = engine.ranks
    memory = engine.served.memory(96)
    plan = passage_params(memory.part, (40, 60), "")
    engine.add(request("p", plan=plan, ids=memory.ids[:60], answer=1))
    engine.finish()
    assert rank.seen["p"][0][1] == "m" * 40
    part = memory.part.model_copy(update={"rereads": ((40, 60),)})
    engine.add(request("aa", memory, plan=LoadParams(parts=(part,))))
    engine.finish()
    assert rank.first_sight("aa") == ("65. 31m", "40m 20n 36m")


# Preemption


def test_a_preempted_request_gets_its_memory_again(serve: Serve, overlapped: bool) -> None:
    served = serve()
    rank = Rank(served)
    engine = Engine(served, [rank], blocks=24, overlapped=overlapped)
    memory = served.memory(96)
    engine.add(request("warm", memory))
    engine.finish()
    engine.tokens.clear()
    last = request("a", memory, answer=60)
    engine.add(request("busy", question=60, answer=120), last)
    engine.finish()
    assert last.num_preemptions > 0
    assert engine.tokens == {"busy": 120, "a": 60}
    assert {runs(pass_[1]).split()[0] for pass_ in rank.seen["a"]} == {"96m"}


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
