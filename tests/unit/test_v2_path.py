"""The connector on CUDA's path: driven by vLLM's own scheduler and Model Runner V2's own pieces.

V2 starts asynchronous loads after a step's forward pass, outside of any forward context, and its
scheduler may be a step ahead. Each pass of the stubbed model checks what all layers can see.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from v2_model import Gate, Served, request
from v2_stubs import Engine
from v2_worker import Rank, numbers, runs

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving.connector import worker as worker_module
from awareness_vllm.serving.connector.kv_layout import layer_index
from awareness_vllm.serving.params import LoadParams, passage_params

pytestmark = pytest.mark.unit

Serve = Callable[..., Served]


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
    kept = rank.worker.layout
    for name, pages in zip(kept.layers, kept.pages(), strict=True):
        i, layer = layer_index(name), rank.layers[name]
        blocks = rank.rows["a"].blocks[rank.groups[name]]
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
    engine.add(request("busy", answer=40))
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
    assert engine.tokens == {"busy": 40, "a": 3}


def test_only_an_engine_without_other_work_waits_for_a_file(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V2 calls the connector outside of any forward context: nothing there says what runs."""
    (rank,) = engine.ranks
    waits: list[int] = []
    monkeypatch.setattr(worker_module, "wait", lambda *args: waits.append(1))
    gate = Gate(rank.worker)
    engine.add(request("busy", answer=40), request("a", engine.served.memory(96)))
    engine.until(lambda: "a" in rank.worker.pending and engine.tokens.get("busy", 0) > 5)
    waits.clear()
    for _ in range(5):
        engine.step()
    assert not waits
    engine.until(lambda: "busy" in engine.reports)
    engine.until(lambda: waits)
    gate.open()
    engine.finish()


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


def test_a_second_memory_is_moved_to_its_place_within_the_pages(engine: Engine) -> None:
    (rank,) = engine.ranks
    first, second = engine.served.memory(45), engine.served.memory(70, seed=1)
    engine.add(request("a", first, second))
    engine.finish()
    assert rank.first_sight("a") == ("84. 31m", "115m")


def test_a_mapped_memory_is_decoded_into_the_pages(
    serve: Serve, overlapped: bool, make_package: Callable[..., Package], geometry: Geometry
) -> None:
    served = serve()
    served.map_from(geometry)
    memory = served.mapped(make_package(" ".join(str(37 * i) for i in range(40))))
    rank = Rank(served)
    engine = Engine(served, [rank], overlapped=overlapped)
    engine.add(request("busy", answer=30), request("a", memory))
    engine.finish()
    count = len(memory.ids)
    assert count > 2 * Served.WINDOW
    assert rank.first_sight("a") == (f"{count - 31}. 31m", f"{count}m")
    assert engine.reports["a"]["awareness"]["temperature"] == "cold"


def test_a_step_of_vllm_itself_is_none_of_the_connectors(engine: Engine) -> None:
    """While it warms up and captures graphs, vLLM switches its driver of the connector off."""
    (rank,) = engine.ranks
    engine.add(request("a", engine.served.memory(64)))
    rank.driver.set_disabled(True)
    engine.step()
    assert rank.events == []
    rank.driver.set_disabled(False)


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


def test_an_aborted_passage_leaves_no_rows(engine: Engine) -> None:
    """A passage of two steps, of which the first has been read back."""
    (rank,) = engine.ranks
    captures, memory = rank.worker.captures, engine.served.memory(150)
    plan = passage_params(memory.part, (10, 140), "")
    engine.add(request("p", plan=plan, ids=memory.ids[:140], answer=1))
    engine.until(lambda: captures.parts)
    engine.abort("p")
    engine.finish()
    left = [captures.parts, captures.announced, captures.results, rank.worker.loader.passages.rows]
    assert not any(left), left


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


# All at once


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_whatever_comes_no_request_sees_anothers_states(
    serve: Serve, overlapped: bool, seed: int
) -> None:
    """Requests of all kinds come, end and are aborted over a pool that is too small for them; some
    files cannot be read. The stubbed model looks at whatever it can see."""
    chance = random.Random(seed)
    served = serve(retention=chance.choice([0, None]))
    rank = Rank(served, graphs=chance.random() < 0.5)
    engine = Engine(served, [rank], blocks=36, overlapped=overlapped)
    memories = [served.memory(chance.randint(20, 120), seed=i) for i in range(3)]
    loader = rank.worker.loader
    read_source = loader.read_source

    def fail(*args: object) -> Any:
        raise RuntimeError("the disk is gone")

    for i in range(30):
        memory, name = chance.choice(memories), f"{i}"
        loader.read_source = fail if chance.random() < 0.2 else read_source
        if chance.random() < 0.3:
            loader.warm.drop(memory.part.memory)
        if chance.random() < 0.2:
            plan = passage_params(memory.part, (8, len(memory.ids)), "")
            engine.add(request(name, plan=plan, ids=memory.ids, answer=1))
        else:
            asked = [memory] if chance.random() < 0.7 else []
            capture = f"key-{i}" if chance.random() < 0.3 else None
            if capture:
                rank.worker.captures.announce(capture, "")
            question, answer = chance.randint(8, 90), chance.randint(1, 40)
            engine.add(request(name, *asked, question=question, answer=answer, capture=capture))
        for _ in range(chance.randint(0, 6)):
            engine.step()
        if chance.random() < 0.3:
            engine.abort(
                *chance.sample([*engine.scheduler.requests], len(engine.scheduler.requests) // 3)
            )
    engine.finish()
    assert len(rank.seen) > 5
