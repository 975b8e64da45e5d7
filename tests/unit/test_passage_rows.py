"""Re-read passages in a worker: rows that are read back, kept, and laid over what is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from connector_stubs import MEMORY, plan_with
from cpu_layers import HEADS, random_states
from torch import Tensor
from worker_stubs import KEY, NAMES, NOWHERE, layer_states, load_now, made_worker, warm_memory

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import AwarenessError, PackageCorrupt, PassageMissing
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rotate, unrotate
from awareness_vllm.serving.connector import worker as worker_module
from awareness_vllm.serving.connector.passages import PassageTier
from awareness_vllm.serving.connector.scheduler import LoadSpec, SaveSpec
from awareness_vllm.serving.connector.worker import ConnectorWorker
from awareness_vllm.serving.params import LoadParams, Part, passage_params

pytestmark = pytest.mark.unit


@pytest.fixture
def worker(geometry: Geometry) -> ConnectorWorker:
    return made_worker(geometry)


SPAN = (5, 9)
BLOCKS = ([2], [20, 21, 22, 23])


def keep_passage(worker: ConnectorWorker, seed: int = 9) -> list[Tensor]:
    """Have the worker read a passage back that the model has computed at SPAN: its keys and values,
    layer by layer."""
    states = [random_states(4, 64, torch.bfloat16, seed + i) for i in range(4)]
    slots = worker.layout.slot_mappings(BLOCKS, *SPAN)
    for i in range(2):
        worker.writer.write(i, states[i], states[2 + i], slots[i])
    name = (KEY, SPAN)
    worker.save(SaveSpec("p", 5, 7, 9, BLOCKS, name))
    assert name not in worker.loader.passages.rows
    worker.save(SaveSpec("p", 7, 9, 9, BLOCKS, name))
    assert worker.captures.results == {}
    assert worker.captures.parts == {}
    return states


def rereading(begin: int, end: int, *spans: tuple[int, int], first: int = 0) -> LoadSpec:
    """A load of positions begin … end-1 after a head of `first` tokens, with passages laid over."""
    (part,) = plan_with(tokens=12).parts
    parts = (part.model_copy(update={"rereads": spans}),)
    ids = list(range(12))
    if first:
        head = Part(memory="head", digest="head", tokens=first)
        parts, ids = (head, *parts), [*range(900, 900 + first), *ids]
    blocks = ([3], [*range(30, 30 + -(-end // 3))])
    return LoadSpec("r", LoadParams(parts=parts), ids, begin, end, blocks)


@pytest.mark.parametrize(("begin", "end"), [(0, 12), (6, 12), (0, 7), (6, 8), (9, 12), (0, 5)])
def test_a_passages_rows_are_laid_over_the_loads_tokens(
    worker: ConnectorWorker, begin: int, end: int
) -> None:
    states = keep_passage(worker)
    memory = warm_memory(worker)
    load_now(worker, rereading(begin, end, SPAN))
    expected = [s.clone() for s in (*memory.keys, *memory.values)]
    for whole, own in zip(expected, states, strict=True):
        whole[5:9] = own
    for i, first in enumerate((96, 90)):
        key, value = layer_states(worker, i, [*range(first + begin, first + end)])
        assert torch.equal(key, expected[i][begin:end])
        assert torch.equal(value, expected[2 + i][begin:end])


def test_a_passage_moves_with_its_memory(worker: ConnectorWorker) -> None:
    states = keep_passage(worker)
    worker.loader.keep_head("head", AlignedMemory(list(range(900, 903)), *([[]] * 2)))
    load_now(worker, rereading(3, 15, SPAN, first=3))
    rope = worker.model.geometry.layers[0].positions
    key, value = layer_states(worker, 0, [*range(96 + 8, 96 + 12)])
    moved = rotate(unrotate(states[0], torch.arange(5, 9), rope), torch.arange(8, 12), rope)
    torch.testing.assert_close(key.float(), moved, rtol=2**-7, atol=2**-6)
    assert torch.equal(value, states[2])


def test_each_rank_keeps_and_lays_over_its_own_heads(
    geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks: of a memory's heads it writes the second half, of a passage all that
    it has read back itself."""
    second = slice(HEADS, 2 * HEADS)
    monkeypatch.setattr(worker_module, "slice_of_rank", lambda total, local: second)
    worker = made_worker(geometry, heads=2 * HEADS)
    name = (KEY, SPAN)
    states = [random_states(4, 64, torch.bfloat16, 9 + i) for i in range(4)]
    slots = worker.layout.slot_mappings(BLOCKS, *SPAN)
    for i in range(2):
        worker.own_writer.write(i, states[i], states[2 + i], slots[i])
    worker.save(SaveSpec("p", 5, 9, 9, BLOCKS, name))
    load_now(worker, rereading(0, 12, SPAN))
    memory = warm_memory(worker)
    for i, first in enumerate((96, 90)):
        expected = memory.keys[i][:, second].clone()
        expected[5:9] = states[i]
        assert torch.equal(layer_states(worker, i, [*range(first, first + 12)])[0], expected)


def test_a_load_without_one_of_its_passages_fails(worker: ConnectorWorker) -> None:
    keep_passage(worker)
    with pytest.raises(PassageMissing, match="--reread-cache-gib"):
        load_now(worker, rereading(0, 12, SPAN, (9, 11)))
    worker.loader.evict(MEMORY, "")
    assert not worker.loader.passages.rows


def test_a_passages_request_loads_the_beginning_of_its_memory(worker: ConnectorWorker) -> None:
    params = passage_params(plan_with(tokens=12).parts[0], SPAN, "")
    load = LoadSpec("r", params, list(range(9)), 0, 5, ([3], [30, 31]))
    assert load_now(worker, load).tokens == 5
    wrong = replace(load, ids=[*range(8), 99])
    with pytest.raises(PackageCorrupt, match="not its memory's"):
        load_now(worker, wrong)


def test_what_was_read_back_of_an_aborted_passage_is_dropped(worker: ConnectorWorker) -> None:
    worker.save(SaveSpec("p", 5, 7, 9, BLOCKS, (KEY, SPAN)))
    assert not worker.cancel("p")
    assert worker.captures.parts == worker.captures.announced == {}


def test_a_passage_that_cannot_be_read_back_is_not_kept(worker: ConnectorWorker) -> None:
    assert worker.check_read_back() == ""
    with pytest.raises(AwarenessError, match="not read back"):
        worker.save(SaveSpec("p", 5, 9, 9, ([2], NOWHERE), (KEY, SPAN)))
    assert not worker.loader.passages.rows
    worker.layout.layers[NAMES[0]].kv_cache = torch.zeros(1, 1, 32, 8, dtype=torch.uint8)
    assert "quantised" in worker.check_read_back()


def test_the_least_recently_used_passages_go_first(worker: ConnectorWorker) -> None:
    keep_passage(worker)
    rows = worker.loader.passages.get((KEY, SPAN))
    tier = PassageTier(2 * rows.bytes)
    names = [(KEY, (b, b + 4)) for b in range(3)]
    tier.put(names[0], rows)
    tier.put(names[1], rows)
    tier.get(names[0])
    tier.put(names[2], rows)
    tier.put(names[2], rows)
    assert [*tier.rows] == [names[0], names[2]]
    assert tier.bytes == 2 * rows.bytes
    tier.drop(MEMORY)
    assert tier.bytes == 0
