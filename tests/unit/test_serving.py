"""The vLLM side without an engine: slots, parameters, the warm tier, and what failures come to.

All tests that import vLLM are here: the import takes seconds.
"""

from __future__ import annotations

import string
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorTransferResults,
)
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.v1.outputs import KVConnectorOutput

from awareness_vllm.align.kv_writer import KVWriter
from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.errors import LoadTimeout, PackageCorrupt, UnsupportedModel
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.models.rope import rotate, unrotate
from awareness_vllm.serving.config import PARAMS_KEY, ServingConfig
from awareness_vllm.serving.connector.connector import AwarenessConnector
from awareness_vllm.serving.connector.kv_layout import check_layers, check_rotations, layer_index
from awareness_vllm.serving.connector.kv_reader import block_layout, read_slots
from awareness_vllm.serving.connector.loader import Found, MemoryLoader
from awareness_vllm.serving.connector.metrics import LoadTracker, StepOutcomes
from awareness_vllm.serving.connector.scheduler import (
    MIN_COMPUTED,
    PAD_SLOT_ID,
    ConnectorMetadata,
    ConnectorScheduler,
    LoadSpec,
    SaveSpec,
)
from awareness_vllm.serving.connector.worker import ConnectorWorker, Loaded
from awareness_vllm.serving.params import LoadParams, Part, kv_transfer_params
from awareness_vllm.serving.tiers import WarmTier

pytestmark = pytest.mark.unit

MEMORY = "mem_" + "0" * 32


def one(
    memory: str = MEMORY, wmatrix: str = "", *, tokens: int = 1, tail: int = 0, salt: str = ""
) -> LoadParams:
    """What a request with one memory tells the connector."""
    part = Part(memory=memory, wmatrix=wmatrix, tokens=tokens)
    return LoadParams(parts=(part,), tail=tail, caller_salt=salt)


def scheduler_half(*block_sizes: int) -> ConnectorScheduler:
    specs = [SimpleNamespace(block_size=b, sliding_window=None) for b in block_sizes]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return ConnectorScheduler(SimpleNamespace(kv_cache_groups=groups))  # type: ignore[arg-type]


def request(
    tokens: int = 40,
    *,
    memory: int = 20,
    tail: int = 0,
    name: str = "r",
    salt: str | None = None,
) -> Any:
    """What vLLM's `Request` shows of a prompt of `tokens` ids, `memory` of them a memory's."""
    params = one(tokens=memory, tail=tail)
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_computed_tokens=0,
        prompt_token_ids=list(range(tokens)),
        cache_salt=salt or params.cache_salt,
        kv_transfer_params=kv_transfer_params(params),
    )


def blocks(*groups: list[int]) -> Any:
    """What vLLM's `KVCacheBlocks` shows; SKIP makes a null block (whose ID is 0)."""
    return SimpleNamespace(
        blocks=tuple(
            [
                SimpleNamespace(is_null=b == PAD_SLOT_ID, block_id=0 if b == PAD_SLOT_ID else b)
                for b in group
            ]
            for group in groups
        )
    )


# Slots


def test_slots_of_two_groups_with_a_null_block_and_a_partial_last_one() -> None:
    found = scheduler_half(4, 2).slot_mapping([[9, 3], [PAD_SLOT_ID, PAD_SLOT_ID, 5]], 2, 6)
    assert found == ([38, 39, 12, 13], [PAD_SLOT_ID, PAD_SLOT_ID, 10, 11])
    assert scheduler_half(4).slot_mapping([[7]], 1, 3) == ([29, 30],)
    assert scheduler_half(4).slot_mapping([[7]], 3, 3) == ([],)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int, int]:
    """Block sizes and tables of some groups, and a range of positions that they cover."""
    end = draw(st.integers(0, 100))
    sizes = draw(st.lists(st.sampled_from([1, 2, 16, 32, 48]), min_size=1, max_size=4))
    ids = []
    for size in sizes:
        count = -(-end // size) + draw(st.integers(0, 2))
        real = draw(st.lists(st.integers(1, 500), min_size=count, max_size=count, unique=True))
        null = draw(st.integers(0, count))
        ids.append([PAD_SLOT_ID] * null + real[null:])
    return sizes, ids, draw(st.integers(0, end)), end


@given(cos_sin_table=tables())
def test_every_position_has_its_slot(
    cos_sin_table: tuple[list[int], list[list[int]], int, int],
) -> None:
    sizes, ids, begin, end = cos_sin_table
    found = scheduler_half(*sizes).slot_mapping(ids, begin, end)
    for size, group, slot_mapping in zip(sizes, ids, found, strict=True):
        assert len(slot_mapping) == end - begin
        for position, slot in zip(range(begin, end), slot_mapping, strict=True):
            if group[position // size] == PAD_SLOT_ID:
                assert slot == PAD_SLOT_ID
            else:
                assert divmod(slot, size) == (group[position // size], position % size)
        real = [slot for slot in slot_mapping if slot != PAD_SLOT_ID]
        assert len(set(real)) == len(real)


# What a request may tell the connector

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["parts", "memory", "tokens", "tail", "caller_salt", PARAMS_KEY, "x"]),
            inner,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(params=json_values, salt=st.none() | st.text(max_size=10))
def test_what_a_client_makes_up_is_ignored(params: object, salt: str | None) -> None:
    assert LoadParams.of(params, salt) is None
    assert LoadParams.of({PARAMS_KEY: params}, salt) is None


@given(
    memory=st.text(max_size=5),
    wmatrix=st.text(max_size=5),
    tokens=st.integers(1),
    salt=st.text(),
)
def test_only_with_the_salt_that_belongs_to_them(
    memory: str, wmatrix: str, tokens: int, salt: str
) -> None:
    params = one(memory, wmatrix, tokens=tokens, salt=salt)
    carried = kv_transfer_params(params, {"other": 1})
    assert carried["other"] == 1
    found = LoadParams.of(carried, params.cache_salt)
    assert found == params
    for other in (None, "", salt, params.cache_salt[:-1], params.cache_salt + "0"):
        assert LoadParams.of(carried, other) is None
    part = carried[PARAMS_KEY]["parts"][0]
    forged = {PARAMS_KEY: carried[PARAMS_KEY] | {"parts": [part | {"memory": memory + "x"}]}}
    assert LoadParams.of(forged, params.cache_salt) is None
    for token_nll in ({"token_nll": 1}, {"parts": []}, {"parts": [part | {"tokens": 0}]}):
        changed = {PARAMS_KEY: carried[PARAMS_KEY] | token_nll}
        assert LoadParams.of(changed, params.cache_salt) is None


@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from('a",\\[] @/\0'), max_size=4)] * 3),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_the_salt_tells_memory_map_and_caller_apart(parts: list[tuple[str, str, str]]) -> None:
    salts = {one(m, w, salt=s).cache_salt for m, w, s in parts}
    assert len(salts) == len(parts)
    for salt in salts:
        validate_cache_salt(salt)
        assert len(salt) <= 128
        assert set(salt) <= set(string.ascii_lowercase + string.digits + "-")


def test_the_salt_tells_how_much_was_read_natively() -> None:
    assert len({one(tail=n).cache_salt for n in (0, 1)}) == 2


def test_a_salt_cannot_be_shifted_from_one_part_to_the_next() -> None:
    parts = [("a", "b", ""), ("ab", "", ""), ("a", "", "b"), ("", "a", "b"), ('a", "b', "", "")]
    salts = {one(m, w, salt=s).cache_salt for m, w, s in parts}
    assert len(salts) == len(parts)


def test_the_salt_tells_order_tenant_and_what_is_skipped() -> None:
    first, second = (Part(memory=name, tokens=1) for name in ("a", "b"))
    skipped = second.model_copy(update={"skip": 1})
    salts = {
        LoadParams(parts=parts, tenant=tenant).cache_salt
        for parts in ((first, second), (second, first), (first, skipped), (first,))
        for tenant in ("", "acme")
    }
    assert len(salts) == 8


# The scheduler half


@given(
    tokens=st.integers(1, 60),
    memory=st.integers(1, 60),
    tail=st.integers(0, 20),
    computed=st.integers(0, 60),
)
def test_tokens_to_load(tokens: int, memory: int, tail: int, computed: int) -> None:
    half, asking = scheduler_half(16), request(tokens, memory=memory, tail=tail)
    found = half.tokens_to_load(asking, computed)
    assert found == half.tokens_to_load(asking, computed)
    assert found >= 0
    if found:
        assert computed + found == min(memory - tail, tokens - MIN_COMPUTED)
    else:
        assert computed >= min(memory - tail, tokens - MIN_COMPUTED)
    assert half.take_step() == ConnectorMetadata()


def test_requests_that_are_not_ours_load_nothing() -> None:
    half = scheduler_half(16)
    assert half.tokens_to_load(request(salt="forged"), 0) == 0
    plain = request()
    plain.kv_transfer_params, plain.cache_salt = None, None
    assert half.tokens_to_load(plain, 0) == 0
    half.allocated(plain, blocks([1, 2, 3]), 0)
    assert half.take_step() == ConnectorMetadata()


def test_the_memorys_last_tokens_go_into_the_requests_blocks() -> None:
    half = scheduler_half(16, 8)
    asking = request(60, memory=45, tail=5)
    assert half.tokens_to_load(asking, 16) == 24
    half.allocated(
        asking, blocks([7, 8, 9], [PAD_SLOT_ID, PAD_SLOT_ID, PAD_SLOT_ID, PAD_SLOT_ID, 6]), 24
    )
    (load,) = half.take_step().loads
    assert (load.request_id, load.begin) == ("r", 16)
    assert load.ids == list(range(45))
    assert load.slot_mapping == ([*range(128, 152)], [PAD_SLOT_ID] * 16 + [*range(48, 56)])
    assert half.take_step() == ConnectorMetadata()


def scheduled(
    params: object, *, computed: int = 0, step: int = 5, tokens: int = 5, ids: Any = ([2, 3],)
) -> Any:
    """What vLLM's `SchedulerOutput` shows of a new request."""
    new = SimpleNamespace(
        req_id="r",
        prompt_token_ids=list(range(tokens)),
        sampling_params=SimpleNamespace(extra_args={"kv_transfer_params": params}),
        num_computed_tokens=computed,
        block_ids=ids,
    )
    return SimpleNamespace(
        scheduled_new_reqs=[new], scheduled_cached_reqs=cached(), num_scheduled_tokens={"r": step}
    )


def cached(*names: str, ids: Any = None, computed: int = 0, resumed: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        req_ids=list(names),
        new_block_ids=[ids] * len(names),
        num_computed_tokens=[computed] * len(names),
        resumed_req_ids=set(resumed),
    )


def later(step: int, *names: str, **what: Any) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached(*names, **what),
        num_scheduled_tokens=dict.fromkeys(names, step),
    )


def test_a_capture_is_read_back_when_its_whole_prompt_is_computed() -> None:
    half = scheduler_half(4)
    for output in (scheduled(None), scheduled({"other": 1}), scheduled({"key": 7})):
        half.plan_saves(output, "key")
        assert half.take_step() == ConnectorMetadata()
    half.plan_saves(scheduled({"key": "p"}), "key")
    assert half.take_step().saves == [SaveSpec("p", 5, ([8, 9, 10, 11, 12],))]


def test_a_captures_blocks_are_gathered_over_the_steps_of_its_prompt() -> None:
    half = scheduler_half(4)
    half.plan_saves(scheduled({"key": "p"}, step=4, ids=([2],)), "key")
    half.plan_saves(later(1, "another"), "key")
    assert half.take_step() == ConnectorMetadata()
    half.plan_saves(later(1, "r", ids=([9],), computed=4), "key")
    assert half.take_step().saves == [SaveSpec("p", 5, ([8, 9, 10, 11, 36],))]
    half.plan_saves(later(1, "r", ids=([5],), computed=5), "key")
    assert half.take_step() == ConnectorMetadata()


def test_a_preempted_capture_starts_its_blocks_anew() -> None:
    half = scheduler_half(4)
    half.plan_saves(scheduled({"key": "p"}, step=4, ids=([2],)), "key")
    half.plan_saves(later(5, "r", ids=([6, 7],), resumed=("r",)), "key")
    assert half.take_step().saves == [SaveSpec("p", 5, ([24, 25, 26, 27, 28],))]


def test_a_finished_request_is_captured_no_more() -> None:
    half = scheduler_half(4)
    half.plan_saves(scheduled({"key": "p"}, step=4, ids=([2],)), "key")
    half.finished("r")
    half.plan_saves(later(1, "r", ids=([9],), computed=4), "key")
    assert half.take_step() == ConnectorMetadata()


@pytest.mark.parametrize(("computed", "kept"), [(0, True), (4, False)])
def test_a_window_holds_a_prompt_only_if_one_step_computed_it(computed: int, kept: bool) -> None:
    half = scheduler_half(4, 4)
    half.windows = [None, 3]
    asked = scheduled({"key": "p"}, computed=computed, step=5 - computed, ids=([2, 3], [4, 5]))
    half.plan_saves(asked, "key")
    (save,) = half.take_step().saves
    assert save.slot_mapping == (
        [8, 9, 10, 11, 12],
        [16, 17, 18, 19, 20] if kept else [PAD_SLOT_ID] * 5,
    )


# The worker half


def memory_of(size: int) -> AlignedMemory:
    state = torch.zeros(size, 1, 1)
    return AlignedMemory(list(range(size)), [state], [state])


def test_the_warm_tier_drops_the_least_recently_used_by_bytes() -> None:
    tier = WarmTier(100 * 8)
    for name, size in (("a", 40), ("b", 40), ("c", 20)):
        tier.put((name, ""), memory_of(size))
    assert tier.get(("a", "")) is not None
    tier.put(("d", ""), memory_of(1))
    assert [key[0] for key in tier.memories] == ["c", "a", "d"]
    assert tier.get(("b", "")) is None
    tier.put(("e", ""), memory_of(99))
    assert [key[0] for key in tier.memories] == ["d", "e"]


def test_the_warm_tier_keeps_one_memory_that_is_too_large() -> None:
    tier = WarmTier(8)
    tier.put(("a", ""), memory_of(5))
    tier.put(("b", ""), memory_of(50))
    assert [key[0] for key in tier.memories] == ["b"]
    assert tier.get(("b", "other map")) is None


def test_layer_index() -> None:
    assert layer_index("model.layers.7.self_attn.attn") == 7
    assert layer_index("language_model.model.layers.12.self_attn") == 12
    assert layer_index("transformer.h.3.attn") == 3
    assert layer_index("model.decoder.layers.0.self_attn.attn") == 0
    for name in ("model.embed", "layers", "model.layers.x.attn", "model.layers.1.experts.2.attn"):
        with pytest.raises(UnsupportedModel, match="layer's index"):
            layer_index(name)


def test_a_server_with_other_layers_is_refused() -> None:
    memories: Any = SimpleNamespace(geometry=SimpleNamespace(layers=[0, 1]))
    check_layers(memories, {"m.layers.0.a": 0, "m.layers.1.a": 0})
    with pytest.raises(UnsupportedModel, match="other layers"):
        check_layers(memories, {"m.layers.0.a": 0, "m.layers.2.a": 0})


def turning(theta: float, *, halves: bool = True) -> torch.nn.Module:
    """A model of one attention layer, with vLLM's own rotary embedding."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    model, layer = torch.nn.Module(), torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        rope = {"rope_type": "default", "rope_theta": theta}
        layer.rotary_emb = get_rope(64, 256, halves, rope, torch.bfloat16)
    model.h = torch.nn.ModuleList([layer])
    return model


@pytest.mark.parametrize(
    ("theta", "halves", "change"),
    [
        (1e5, True, {}),
        (1e4, False, {}),
        (1e4, True, {"interleaved": True}),
        (1e4, True, {"rotary_dim": 32}),
    ],
    ids=["theta", "pairs", "pairs, said", "partial"],
)
def test_a_model_that_turns_otherwise_is_refused(
    theta: float, halves: bool, change: dict[str, Any], geometry: Geometry
) -> None:
    model = turning(theta, halves=halves)
    rope = Positions(scheme="rope", theta=1e4, rotary_dim=64)

    def served(positions: Positions) -> Geometry:
        layer = LayerGeometry(heads=1, head_dim=64, positions=positions)
        return geometry.model_copy(update={"layers": (layer,)})

    check_rotations(turning(1e4), served(rope), ["h.0.attn"])
    check_rotations(model, served(Positions(scheme="none")), ["h.0.attn"])
    check_rotations(torch.nn.Module(), served(rope), ["h.0.attn"])
    with pytest.raises(UnsupportedModel, match=r"h\.0\.attn turns its keys otherwise"):
        check_rotations(model, served(rope.model_copy(update=change)), ["h.0.attn"])


# Blocks, written and read by vLLM's own CPU operator

LAYOUTS = [
    pytest.param(torch.bfloat16, 32, 64, "vec", id="bf16"),
    pytest.param(torch.float32, 32, 64, "vec", id="fp32"),
    pytest.param(torch.float16, 64, 32, "vec", id="fp16"),
    pytest.param(torch.bfloat16, 16, 80, "vec16", id="bf16, odd heads"),
    pytest.param(torch.bfloat16, 32, 64, "amx", id="bf16, AMX"),
]
COUNT, HEADS = 6, 3


def cpu_layer(dtype: torch.dtype, size: int, width: int, isa: str) -> Any:
    """One attention layer as far as its cache goes: vLLM's CPU implementation, and no engine."""
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = AttentionType.DECODER, "auto"
    cache = torch.full((COUNT, HEADS, size, 2 * width), -7.0, dtype=dtype)
    return SimpleNamespace(
        impl=impl,
        kv_cache=cache,
        num_kv_heads=HEADS,
        isa=isa,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


@pytest.fixture(scope="module")
def cpu_operator() -> None:
    """vLLM's platform loads its operators; without the CPU build there are none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("not a CPU build of vLLM")
    current_platform.import_kernels()


def random_states(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, width, generator=generator).to(dtype)


@pytest.mark.usefixtures("cpu_operator")
@pytest.mark.parametrize(("dtype", "size", "width", "isa"), LAYOUTS)
def test_slots_are_read_back_bit_for_bit(
    dtype: torch.dtype, size: int, width: int, isa: str
) -> None:
    layer = cpu_layer(dtype, size, width, isa)
    order = torch.randperm(COUNT * size, generator=torch.Generator().manual_seed(0))
    slot_mapping, others = order[:50], order[50:]
    keys, values = (random_states(len(order), width, dtype, seed) for seed in (1, 2))
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, order)
    new_keys, new_values = (random_states(50, width, dtype, seed) for seed in (3, 4))
    layer.impl.do_kv_cache_update(layer, new_keys, new_values, layer.kv_cache, slot_mapping)
    before = layer.kv_cache.clone()
    key, value = read_slots(layer, slot_mapping)
    assert key.dtype == dtype
    assert torch.equal(key, new_keys)
    assert torch.equal(value, new_values)
    key, value = read_slots(layer, others)
    assert torch.equal(key, keys[50:])
    assert torch.equal(value, values[50:])
    assert torch.equal(layer.kv_cache, before)


@pytest.mark.usefixtures("cpu_operator")
@pytest.mark.parametrize(("dtype", "size", "width", "isa"), LAYOUTS)
def test_a_layout_places_every_element_once(
    dtype: torch.dtype, size: int, width: int, isa: str
) -> None:
    layer = cpu_layer(dtype, size, width, isa)
    places = torch.cat([block_layout(layer, part) for part in ("key", "value")])
    assert torch.equal(places.sort().values, torch.arange(layer.kv_cache[0].numel()))
    assert (layer.kv_cache == -7).all()


def test_a_quantised_cache_cannot_be_captured() -> None:
    layer = SimpleNamespace(kv_cache=torch.zeros(1, 1, 32, 8, dtype=torch.uint8), num_kv_heads=1)
    with pytest.raises(UnsupportedModel, match="quantised"):
        block_layout(layer, "key")


NAMES = ("model.layers.0.attn", "model.layers.1.attn")


@pytest.fixture
def worker(cpu_operator: None) -> ConnectorWorker:
    """A worker with two layers in two groups, and one memory of 12 tokens in its warm tier."""
    half = ConnectorWorker.__new__(ConnectorWorker)
    half.groups = dict(zip(NAMES, (0, 1), strict=True))
    half.layers = {name: cpu_layer(torch.bfloat16, 32, 64, "vec") for name in NAMES}
    half.dtype = torch.bfloat16
    half.pending, half.deadline = {}, 30.0
    layer = LayerGeometry(
        heads=HEADS, head_dim=64, positions=Positions(scheme="rope", theta=1e4, rotary_dim=64)
    )
    half.memories = SimpleNamespace(geometry=SimpleNamespace(layers=(layer, layer)))
    half.writer = half.kv_writer_of(half.memories.geometry)
    half.loader = MemoryLoader(ServingConfig(store="none"), half.memories, torch.bfloat16)
    states = [random_states(12, 64, torch.bfloat16, seed) for seed in range(4)]
    half.loader.warm.put((MEMORY, ""), AlignedMemory(list(range(12)), states[:2], states[2:]))
    return half


def load_now(worker: ConnectorWorker, load: LoadSpec) -> Loaded:
    """A load whose memories are warm, in the step that asks for it."""
    worker.begin(load)
    assert worker.ready() == [load.request_id]
    return worker.finish(load.request_id)


def load_of(slot_mapping: tuple[list[int], ...], *, name: str = "r", ids: int = 12) -> LoadSpec:
    params = one(tokens=12)
    return LoadSpec(name, params, list(range(ids)), begin=4, slot_mapping=slot_mapping)


def test_a_load_writes_its_tokens_and_nothing_else(worker: ConnectorWorker) -> None:
    # Positions 4 … 11; in the second group the first five are outside the window.
    slot_mapping = ([40 + i for i in range(8)], [PAD_SLOT_ID] * 5 + [97, 98, 99])
    load_now(worker, load_of(slot_mapping))
    memory = worker.loader.warm.get((MEMORY, ""))
    assert memory is not None
    for i, (name, first) in enumerate(zip(NAMES, (4, 9), strict=True)):
        real = torch.tensor([slot for slot in slot_mapping[i] if slot != PAD_SLOT_ID])
        key, value = read_slots(worker.layers[name], real)
        assert torch.equal(key, memory.keys[i][first:])
        assert torch.equal(value, memory.values[i][first:])
        rest = torch.tensor([slot for slot in range(COUNT * 32) if slot not in slot_mapping[i]])
        for state in read_slots(worker.layers[name], rest):
            assert (state == -7).all()


def test_null_blocks_are_never_handed_to_the_operator(
    worker: ConnectorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU's operator passes over negative slots; that is not every operator's habit.
    written: list[int] = []
    monkeypatch.setattr(
        KVWriter, "write", lambda self, _, k, v, slot_mapping: written.extend(slot_mapping.tolist())
    )
    load_now(worker, load_of(([PAD_SLOT_ID] * 4 + [4, 5, 6, 7], [PAD_SLOT_ID] * 8)))
    assert written == [4, 5, 6, 7]


def test_a_group_without_real_blocks_is_left_alone(worker: ConnectorWorker) -> None:
    load_now(worker, load_of((list(range(8)), [PAD_SLOT_ID] * 8)))
    assert (worker.layers[NAMES[1]].kv_cache == -7).all()


def test_memories_follow_each_other_and_their_keys_move_with_them(worker: ConnectorWorker) -> None:
    """After a first memory of 12 tokens a second one, of which the first 2 are left out."""
    states = [random_states(6, 64, torch.bfloat16, seed) for seed in range(4, 8)]
    second = AlignedMemory(list(range(100, 106)), states[:2], states[2:])
    worker.loader.warm.put(("second", ""), second)
    first = worker.loader.warm.get((MEMORY, ""))
    assert first is not None
    parts = (
        Part(memory=MEMORY, tokens=12),
        Part(memory="second", skip=2, tokens=4),
    )
    slot_mapping = list(range(64, 74))
    ids = [*range(12), *range(102, 106)]
    # Positions 6 … 15: six of the first memory, then all of the second.
    load_now(
        worker,
        LoadSpec(
            "r", LoadParams(parts=parts), ids, begin=6, slot_mapping=(slot_mapping, slot_mapping)
        ),
    )
    rope = worker.memories.geometry.layers[0].positions
    for i, name in enumerate(NAMES):
        key, value = read_slots(worker.layers[name], torch.tensor(slot_mapping))
        assert torch.equal(key[:6], first.keys[i][6:])
        assert torch.equal(value, torch.cat([first.values[i][6:], second.values[i][2:]]))
        # What was cached at 2 … 5 stands at 12 … 15 now.
        free = unrotate(second.keys[i][2:], torch.arange(2, 6), rope)
        moved = rotate(free, torch.arange(12, 16), rope)
        torch.testing.assert_close(key[6:].float(), moved, rtol=2**-7, atol=2**-7)


def test_only_the_memories_that_are_wanted_are_asked_for(worker: ConnectorWorker) -> None:
    parts = (Part(memory="not there", tokens=5), Part(memory=MEMORY, tokens=12))
    ids = [*range(900, 905), *range(12)]
    slot_mapping = list(range(12))
    loaded = load_now(
        worker,
        LoadSpec(
            "r", LoadParams(parts=parts), ids, begin=5, slot_mapping=(slot_mapping, slot_mapping)
        ),
    )
    assert (loaded.temperature, loaded.tokens) == ("hot", 12)
    # Layers, tokens, keys and values, heads, dims, bytes of a bfloat16.
    assert loaded.bytes == 2 * 12 * 2 * HEADS * 64 * 2


def test_another_prompt_than_the_memorys_is_refused_before_writing(worker: ConnectorWorker) -> None:
    with pytest.raises(PackageCorrupt, match="not its memory's"):
        load_now(worker, load_of((list(range(8)), list(range(8))), ids=11))
    assert all((layer.kv_cache == -7).all() for layer in worker.layers.values())


class Slow:
    """Files that take until they are told to end."""

    def __init__(self, worker: ConnectorWorker) -> None:
        self.futures: dict[str, Future[Any]] = {}
        self.worker = worker
        worker.loader.readers = SimpleNamespace(submit=self.submit)  # type: ignore[assignment]

    def submit(self, function: Any, part: Part, *rest: Any) -> Future[Any]:
        return self.futures.setdefault(part.memory, Future())

    def ends(self, memory: str) -> None:
        aligned = self.worker.loader.warm.get((MEMORY, ""))
        self.futures[memory].set_result((Found(aligned), "cold"))


def cold_load(request: str, memory: str, slot_mapping: int = 12) -> LoadSpec:
    params = one(memory, tokens=12)
    return LoadSpec(
        request,
        params,
        list(range(12)),
        0,
        (list(range(slot_mapping)), [PAD_SLOT_ID] * slot_mapping),
    )


def test_a_cold_load_is_written_in_the_step_that_finds_it_aligned(worker: ConnectorWorker) -> None:
    slow = Slow(worker)
    worker.begin(cold_load("r", "m"))
    worker.begin(cold_load("s", "n"))
    assert worker.ready() == []
    slow.ends("n")
    assert worker.ready() == ["s"]
    assert worker.finish("s").temperature == "cold"
    slow.ends("m")
    assert worker.ready() == ["r"]
    assert worker.finish("r").tokens == 12
    assert worker.ready() == []
    assert worker.loader.warm.get(("m", "")) is not None


def test_an_idle_engine_waits_for_the_first_alignment_and_no_longer(
    worker: ConnectorWorker,
) -> None:
    slow = Slow(worker)
    worker.begin(cold_load("r", "m"))
    threading.Timer(0.001, slow.ends, ["m"]).start()
    began = time.perf_counter()
    while not worker.ready(idle=True):
        assert time.perf_counter() - began < 30
    assert worker.finish("r").temperature == "cold"
    assert worker.ready(idle=True) == []


def test_what_is_not_aligned_in_time_fails_and_is_warm_for_the_next(
    worker: ConnectorWorker,
) -> None:
    slow = Slow(worker)
    worker.deadline = 0.0
    worker.begin(cold_load("r", "m"))
    assert worker.ready() == ["r"]
    with pytest.raises(LoadTimeout, match="--load-timeout"):
        worker.finish("r")
    assert (worker.layers[NAMES[0]].kv_cache == -7).all()
    slow.ends("m")
    assert worker.ready() == []
    assert load_now(worker, cold_load("s", "m")).temperature == "warm"


def test_an_alignment_that_fails_fails_its_loads_alone(worker: ConnectorWorker) -> None:
    slow = Slow(worker)
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
    monkeypatch.setattr("awareness_vllm.serving.connector.worker.MOST_LOADED", 10)
    for request, slot_mapping in (("long", 12), ("a", 5), ("b", 5), ("c", 1)):
        worker.begin(cold_load(request, MEMORY, slot_mapping))
    for expected in (["long"], ["a", "b"], ["c"], []):
        assert worker.ready() == expected
        for request in expected:
            worker.finish(request)


def test_a_dropped_load_is_never_written_and_its_alignment_ends(worker: ConnectorWorker) -> None:
    slow = Slow(worker)
    worker.begin(cold_load("r", "m"))
    assert worker.drop("r")
    assert not worker.drop("r")
    assert worker.ready() == []
    assert slow.futures["m"].cancelled()


# The connector: nothing that goes wrong reaches the engine


def connector(*, finish: Callable[[str], Loaded | None] = lambda request: None) -> Any:
    """Its loads arrive in the step that asks for them; what is still waiting can be dropped."""
    made: Any = AwarenessConnector.__new__(AwarenessConnector)
    made.config = SimpleNamespace(capture=True)
    made.results = KVConnectorTransferResults()
    made.scheduler = scheduler_half(16)
    pending: list[str] = []

    def ready(*, idle: bool) -> list[str]:
        found, pending[:] = [r for r in pending if r != "slow"], [r for r in pending if r == "slow"]
        return found

    def drop(request: str) -> bool:
        found = request in pending
        pending[:] = [r for r in pending if r != request]
        return found

    made.worker = SimpleNamespace(
        begin=lambda load: pending.append(load.request_id), ready=ready, finish=finish, drop=drop
    )
    made.outcomes, made.tracker = StepOutcomes(), LoadTracker()
    made._connector_metadata = None
    return made


def broken(request: str) -> Loaded | None:
    if request == "bad":
        raise RuntimeError("out of memory, say")
    return None


def step(made: Any, metadata: ConnectorMetadata, *ended: str) -> KVConnectorTransferResults:
    made.bind_connector_metadata(metadata)
    made.start_load_kv(SimpleNamespace(attn_metadata=None))
    made.wait_for_save()
    return made.get_transfer_results(set(ended))


def test_a_load_that_raises_fails_its_own_request_alone() -> None:
    made = connector(finish=broken)
    loads = [load_of(([1],), name=name) for name in ("good", "bad", "also good")]
    found = step(made, ConnectorMetadata(loads=loads))
    assert found.failed_recving == {"bad"}
    assert found.finished_recving == {"good", "bad", "also good"}
    assert step(made, ConnectorMetadata()) == KVConnectorTransferResults()


def test_an_aborted_requests_load_ends_once() -> None:
    """vLLM keeps the blocks of a request that is loading until it hears so, and dies of hearing it
    twice."""
    made = connector()
    loads = [load_of(([1],), name=name) for name in ("slow", "quick")]
    assert step(made, ConnectorMetadata(loads=loads)).finished_recving == {"quick"}
    assert step(made, ConnectorMetadata(), "slow", "quick").finished_recving == {"slow"}
    assert step(made, ConnectorMetadata(), "slow") == KVConnectorTransferResults()


def test_a_failed_request_is_not_asked_for_again() -> None:
    made = connector()
    bad, good = request(name="bad"), request(name="good")
    assert made.get_num_new_matched_tokens(bad, 0) == (20, True)
    made.update_state_after_alloc(bad, blocks([1, 2]), 20)
    made.update_connector_output(KVConnectorOutput(failed_recving={"bad", "aborted"}))
    assert made.scheduler.failed == {"bad"}
    made.update_connector_output(KVConnectorOutput())
    assert made.get_num_new_matched_tokens(bad, 0) == (0, False)
    assert made.get_num_new_matched_tokens(good, 0) == (20, True)
    made.request_finished_all_groups(bad, ([1],))
    assert made.scheduler.failed == set()


def test_a_load_that_cannot_be_planned_fails_its_request() -> None:
    made = connector()
    # One block of 16 for 20 tokens.
    made.update_state_after_alloc(request(name="bad"), blocks([1]), 20)
    made.update_state_after_alloc(request(name="good"), blocks([1, 2, 3]), 20)
    metadata = made.build_connector_meta(later(1))
    assert [load.request_id for load in metadata.loads] == ["good"]
    found = step(made, metadata)
    assert found.failed_recving == {"bad"}
    assert found.finished_recving == {"bad", "good"}


def test_a_request_that_cannot_be_read_is_prefilled() -> None:
    made = connector()
    assert made.get_num_new_matched_tokens(SimpleNamespace(request_id="r"), 0) == (0, False)


def test_a_capture_that_raises_does_not_reach_the_engine() -> None:
    found = step(connector(), ConnectorMetadata(saves=[SaveSpec("/no/such/folder/f", 1, ([1],))]))
    assert found == KVConnectorTransferResults()


def test_plain_requests_pass_through() -> None:
    made = connector()
    plain = request()
    plain.kv_transfer_params = plain.cache_salt = None
    assert made.get_num_new_matched_tokens(plain, 0) == (0, False)
    made.update_state_after_alloc(plain, blocks([1]), 0)
    assert made.scheduler.take_step() == ConnectorMetadata()
    assert made.requires_kv_delivery is False
