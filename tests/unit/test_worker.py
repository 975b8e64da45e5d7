"""The worker half: loads wait for their memories, then write their tokens and nothing else."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connector_stubs import MEMORY, plan_with
from cpu_layers import COUNT, EMPTY, HEADS, random_states
from worker_stubs import (
    KEY,
    NAMES,
    NOWHERE,
    SIZES,
    layer_states,
    load_now,
    made_worker,
    warm_memory,
)

from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import (
    AwarenessError,
    LoadTimeout,
    PackageCorrupt,
)
from awareness_vllm.files import file_digest
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rotate, unrotate
from awareness_vllm.packages.store import Store
from awareness_vllm.serving import tenants
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector import worker as worker_module
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK, KVLayout
from awareness_vllm.serving.connector.loader import LoadedSource
from awareness_vllm.serving.connector.scheduler import BlockIds, LoadSpec, SaveSpec
from awareness_vllm.serving.connector.worker import ConnectorWorker
from awareness_vllm.serving.params import LoadParams, Part
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit


@pytest.fixture
def worker(geometry: Geometry) -> ConnectorWorker:
    return made_worker(geometry)


def load_of(block_ids: BlockIds, *, ids: int = 12) -> LoadSpec:
    """A load of the memory's tokens 4 … 11."""
    return LoadSpec("r", plan_with(tokens=12), list(range(ids)), 4, 12, block_ids)


def is_empty(worker: ConnectorWorker, i: int) -> bool:
    return bool((worker.layout.layers[NAMES[i]].kv_cache == EMPTY).all())


# Writing


def test_a_load_writes_its_tokens_and_nothing_else(worker: ConnectorWorker) -> None:
    # In the second group the tokens 4 … 8 are outside the window.
    load_now(worker, load_of(([1], [*[NULL_BLOCK] * 3, 33])))
    memory = warm_memory(worker)
    for i, (first, slots) in enumerate([(4, [*range(36, 44)]), (9, [99, 100, 101])]):
        key, value = layer_states(worker, i, slots)
        assert torch.equal(key, memory.keys[i][first:])
        assert torch.equal(value, memory.values[i][first:])
        for state in layer_states(worker, i, [*({*range(COUNT * 32)} - {*slots})]):
            assert (state == EMPTY).all()


def test_null_blocks_are_never_handed_to_the_operator(
    worker: ConnectorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU's operator passes over negative slots; that is not every operator's habit.
    written: list[int] = []
    monkeypatch.setattr(KVWriter, "write", lambda self, i, k, v, slots: written.extend(slots))
    load_now(worker, load_of(([1], NOWHERE)))
    load_now(worker, load_of(([1], [*[NULL_BLOCK] * 3, 2])))
    assert [int(slot) for slot in written] == [*range(36, 44), *range(36, 44), 6, 7, 8]


def test_a_group_without_real_blocks_is_left_alone(worker: ConnectorWorker) -> None:
    load_now(worker, load_of(([0], NOWHERE)))
    assert not is_empty(worker, 0)
    assert is_empty(worker, 1)


def test_memories_follow_each_other_and_their_keys_move_with_them(worker: ConnectorWorker) -> None:
    """After a first memory of 12 tokens a second one, of which the first 2 are left out."""
    states = [random_states(6, 64, torch.bfloat16, seed) for seed in range(4, 8)]
    second = AlignedMemory(list(range(100, 106)), states[:2], states[2:])
    worker.loader.warm.put(("second", ""), second)
    first = warm_memory(worker)
    parts = (
        Part(memory=MEMORY, digest=KEY[0], tokens=12),
        Part(memory="second", digest="second", skip=2, tokens=4),
    )
    ids = [*range(12), *range(102, 106)]
    # Positions 6 … 15: six of the first memory, then all of the second.
    slots = list(range(64 + 6, 64 + 16))
    blocks = ([2], [NULL_BLOCK, NULL_BLOCK, 24, 25, 26, 27])
    load_now(worker, LoadSpec("r", LoadParams(parts=parts), ids, 6, 16, blocks))
    rope = worker.model.geometry.layers[0].positions
    for i, where in enumerate((slots, list(range(72, 82)))):
        key, value = layer_states(worker, i, where)
        assert torch.equal(key[:6], first.keys[i][6:])
        assert torch.equal(value, torch.cat([first.values[i][6:], second.values[i][2:]]))
        # Keys that were cached at 2 … 5 stand at 12 … 15 now.
        free = unrotate(second.keys[i][2:], torch.arange(2, 6), rope)
        moved = rotate(free, torch.arange(12, 16), rope)
        torch.testing.assert_close(key[6:].float(), moved, rtol=2**-7, atol=2**-7)


def test_only_the_memories_of_the_loaded_tokens_are_requested(worker: ConnectorWorker) -> None:
    parts = (
        Part(memory="not there", digest="none", tokens=5),
        Part(memory=MEMORY, digest=KEY[0], tokens=12),
    )
    ids = [*range(900, 905), *range(12)]
    blocks = ([0], [*range(6)])
    loaded = load_now(worker, LoadSpec("r", LoadParams(parts=parts), ids, 5, 17, blocks))
    assert (loaded.temperature, loaded.tokens) == ("hot", 12)
    # Layers, tokens, keys and values, heads, dims, bytes of a bfloat16.
    assert loaded.bytes == 2 * 12 * 2 * HEADS * 64 * 2


def test_another_prompt_than_the_memorys_is_refused_before_writing(worker: ConnectorWorker) -> None:
    with pytest.raises(PackageCorrupt, match="not its memory's"):
        load_now(worker, load_of(([0], NOWHERE), ids=11))
    assert is_empty(worker, 0)
    assert is_empty(worker, 1)


def test_too_few_blocks_are_refused_before_writing(worker: ConnectorWorker) -> None:
    with pytest.raises(ValueError, match="3 blocks"):
        load_now(worker, load_of(([0], [1, 2, 3])))
    assert is_empty(worker, 0)


# Waiting


class SlowFiles:
    """Files whose reading takes until `end`."""

    def __init__(self, worker: ConnectorWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.futures: dict[str, Future[LoadedSource]] = {}
        self.source = LoadedSource("cold", warm_memory(worker))
        monkeypatch.setattr(worker.loader, "source_bytes", lambda part, tenant: 1)
        monkeypatch.setattr(worker.loader.reads, "submit", self.submit)
        monkeypatch.setattr(worker.loader.reads, "release", lambda source: source.cancel())

    def submit(self, size: int, read: Any) -> Future[LoadedSource]:
        part, _tenant = read.args
        return self.futures.setdefault(part.memory, Future())

    def end(self, memory: str) -> None:
        self.futures[memory].set_result(self.source)


@pytest.fixture
def slow(worker: ConnectorWorker, monkeypatch: pytest.MonkeyPatch) -> SlowFiles:
    return SlowFiles(worker, monkeypatch)


def cold_load(request: str, memory: str, tokens: int = 12) -> LoadSpec:
    params = plan_with(memory, tokens=12)
    return LoadSpec(request, params, list(range(12)), 0, tokens, ([0], NOWHERE))


def test_a_cold_load_is_written_in_the_step_that_has_it_aligned(
    worker: ConnectorWorker, slow: SlowFiles
) -> None:
    worker.begin(cold_load("r", "m"))
    worker.begin(cold_load("s", "n"))
    assert worker.ready() == []
    slow.end("n")
    assert worker.ready() == ["s"]
    assert worker.finish("s").temperature == "cold"
    slow.end("m")
    assert worker.ready() == ["r"]
    assert worker.finish("r").tokens == 12
    assert worker.ready() == []
    assert worker.loader.warm.get(("m", "")) is not None


def test_an_idle_engine_waits_for_the_first_alignment_and_no_longer(
    worker: ConnectorWorker, slow: SlowFiles
) -> None:
    worker.begin(cold_load("r", "m"))
    threading.Timer(0.001, slow.end, ["m"]).start()
    began = time.perf_counter()
    while not worker.ready(idle=True):
        assert time.perf_counter() - began < 30
    assert worker.finish("r").temperature == "cold"
    assert worker.ready(idle=True) == []


def test_a_load_that_times_out_is_warm_for_the_next(
    worker: ConnectorWorker, slow: SlowFiles
) -> None:
    worker.load_timeout = 0.0
    worker.begin(cold_load("r", "m"))
    assert worker.ready() == ["r"]
    with pytest.raises(LoadTimeout, match="--load-timeout"):
        worker.finish("r")
    assert is_empty(worker, 0)
    slow.end("m")
    assert worker.ready() == []
    assert load_now(worker, cold_load("s", "m")).temperature == "warm"


def test_an_alignment_that_fails_fails_its_loads_alone(
    worker: ConnectorWorker, slow: SlowFiles
) -> None:
    for request in ("r", "s"):
        worker.begin(cold_load(request, "m"))
    slow.futures["m"].set_exception(PackageCorrupt("gone"))
    assert worker.ready() == ["r", "s"]
    for request in ("r", "s"):
        with pytest.raises(PackageCorrupt, match="gone"):
            worker.finish(request)
    assert load_now(worker, cold_load("t", MEMORY)).temperature == "warm"


def test_a_step_writes_no_more_than_it_may_but_for_one_long_load(
    worker: ConnectorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MAX_TOKENS_PER_STEP", 10)
    for request, tokens in (("long", 12), ("a", 5), ("b", 5), ("c", 1)):
        worker.begin(cold_load(request, MEMORY, tokens))
    for expected in (["long"], ["a", "b"], ["c"], []):
        assert worker.ready() == expected
        for request in expected:
            worker.finish(request)


def test_a_cancelled_load_is_never_written_and_its_alignment_ends(
    worker: ConnectorWorker, slow: SlowFiles
) -> None:
    worker.begin(cold_load("r", "m"))
    assert worker.cancel("r")
    assert not worker.cancel("r")
    assert worker.ready() == []
    assert slow.futures["m"].cancelled()


# Captures, and the worker of a vLLM process


def test_captured_states_become_a_head(worker: ConnectorWorker) -> None:
    load_now(worker, cold_load("r", MEMORY))
    save = SaveSpec("head", 0, 3, 3, ([0], [*range(1, 2)]))
    worker.save(save)
    assert "no states of head" in worker.keep_head("head", "name", [0, 1, 2])
    worker.captures.announce("head", "")
    worker.save(save)
    assert worker.keep_head("head", "name", [0, 1, 2]) == ""
    head = worker.loader.heads["name"]
    assert head.ids == [0, 1, 2]
    assert torch.equal(head.keys[0], warm_memory(worker).keys[0][:3])


def test_the_worker_of_a_vllm_process(
    tiny_models: tuple[Path, Path],
    wmatrix: WMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads the tenants' folders, and nothing of their API keys."""
    monkeypatch.setattr(tenants, "_digest", lambda key: pytest.fail("a key was read"))
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"acme": {"api_keys": ["sk-acme"], "store": "acme"}}))
    wmatrix.save(tmp_path / "a.wmatrix")
    layer = SimpleNamespace(num_kv_heads=3)
    groups = [
        SimpleNamespace(layer_names=[name], kv_cache_spec=SimpleNamespace(block_size=size))
        for name, size in zip(NAMES, SIZES, strict=True)
    ]
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(tiny_models[1]), max_model_len=64, dtype=torch.bfloat16
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            static_forward_context={name: layer for name in (*NAMES, "another")}
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        speculative_config=None,
    )
    config = ServingConfig(
        store="none",
        tenants=str(file),
        wmatrices=(str(tmp_path / "a.wmatrix"),),
        host_cache_gib=0.5,
        disk_cache=str(tmp_path / "disk"),
    )
    made = ConnectorWorker.from_vllm(
        config,
        vllm_config,
        SimpleNamespace(kv_cache_groups=groups),  # type: ignore[arg-type]
    )
    served = ServedModel.read(tiny_models[1], 64)
    assert made.model == replace(served, largest=2**15, dtype=torch.bfloat16)
    assert made.layout == KVLayout(
        dict.fromkeys(NAMES, layer), {NAMES[0]: 0, NAMES[1]: 1}, [*SIZES], [None, None]
    )
    assert made.loader.stores == {"acme": Store(tmp_path / "acme")}
    assert (made.loader.warm.limit, made.load_timeout) == (2**29, config.load_timeout)
    assert made.loader.disk is not None
    assert made.loader.disk.limit == 10 * 2**30
    assert [entry.digest for entry in made.registry] == [file_digest(tmp_path / "a.wmatrix")]


class StubModel(torch.nn.Module):
    """A running model, as far as its embedding goes."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(rows, width))
        self.lookups = 0

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        self.lookups += 1
        return self.table[ids]


def test_maps_are_ready_before_there_is_a_cache_and_warm_before_there_is_a_model(
    worker: ConnectorWorker, wmatrix: WMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    monkeypatch.setattr(WMatrix, "map", lambda self, rows, embeddings: used.append(embeddings))
    manifest = wmatrix.manifest.model_copy(update={"target": worker.model.geometry})
    entries = [
        WMatrixEntry(tmp_path / "ours.wmatrix", manifest, "a" * 64),
        WMatrixEntry(tmp_path / "others.wmatrix", wmatrix.manifest, "b" * 64),
    ]
    monkeypatch.setattr(worker_module, "load_wmatrix", lambda path, digest: wmatrix)
    worker.registry = Registry(tuple(entries))
    worker.load_maps(torch.device("cpu"))
    assert list(worker.loader.wmatrices) == ["a" * 64]
    assert used == []
    worker.warm_up()
    assert [len(rows) for rows in used] == [worker_module.WARM_UP_ROWS]
    with pytest.raises(AwarenessError, match="no model to take embeddings from"):
        worker.loader.embed(torch.tensor([0]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_is_bound_once_however_many_api_servers_ask(
    worker: ConnectorWorker, ranks: int
) -> None:
    """Over several ranks each binding looks the whole table up."""
    worker.ranks = ranks
    model = StubModel(worker.model.geometry.vocab_size, 3)
    worker.bind_model(model)
    lookups, embed = model.lookups, worker.loader.embed
    worker.bind_model(model)
    assert (model.lookups, worker.loader.embed) == (lookups, embed)
    assert torch.equal(embed(torch.tensor([1])), model.table[1:2])
