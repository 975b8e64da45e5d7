"""What a memory costs: the bytes that vLLM's own allocator holds, and seconds by a linear model."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from awareness_vllm.compatibility.load_time.cost import (
    held_tokens,
    load_times_s,
    lost_tokens,
    map_work,
    padded,
    target_memory_gb,
    written_bytes,
)
from awareness_vllm.compatibility.load_time.speed import Calibration
from awareness_vllm.compatibility.target import ITEM_BYTES, TargetConfig
from awareness_vllm.evaluate.flops import map_flop
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.serving.load_benchmark import fit_line
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

GEMMA = [512] * 5 + [None]
"""The windows of Gemma-3's layers, six at a time."""


def model(windows: list[int | None], heads: int = 1, head_dim: int = 256) -> Geometry:
    positions = Positions(scheme="none")
    return Geometry(
        name="tiny",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=16,
        vocab_size=100,
        max_positions=32768,
        layers=tuple(
            LayerGeometry(heads=heads, head_dim=head_dim, positions=positions, window=window)
            for window in windows
        ),
        weights="w",
        tokenizer="t",
    )


def gb(geometry: Geometry, tokens: int, **config: Any) -> float:
    return target_memory_gb(geometry, tokens, TargetConfig.read(config))


# Memory


def test_llama_3_70b_by_hand() -> None:
    """80 layers × 2 × 8 heads × 128 × 2 bytes are 327,680 for a token."""
    llama = model([None] * 80, heads=8, head_dim=128)
    assert gb(llama, 1600) == pytest.approx(1600 * 327_680 / 1e9)
    assert gb(llama, 1601) == gb(llama, 1616)
    assert gb(llama, 1601, block_size=128) == pytest.approx(13 * 128 * 327_680 / 1e9)
    assert gb(llama, 1600, kv_cache_dtype="fp8") == gb(llama, 1600) / 2
    assert gb(llama, 1600, quantization="int4") == gb(llama, 1600)
    assert gb(llama, 1600, num_gpus=8) == gb(llama, 1600)
    assert gb(llama, 1600, num_gpus=16) == 2 * gb(llama, 1600)


def test_a_window_holds_its_own() -> None:
    """Of 2,001 tokens the next one sees the last 511: the first 1,490 are lost, in whole blocks."""
    assert lost_tokens(2001, 512, 128) == 11 * 128
    assert (lost_tokens(638, 512, 128), lost_tokens(639, 512, 128)) == (0, 128)
    assert held_tokens(2001, 512, 128) == (16 - 11) * 128
    assert held_tokens(2001, None, 128) == 16 * 128
    gemma = model(GEMMA * 3)
    tokens = 15 * 5 * 128 + 3 * 16 * 128
    assert gb(gemma, 2001, block_size=128) == pytest.approx(tokens * 2 * 256 * 2 / 1e9)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((18,), (18,)),
        ((15, 3), (15, 3)),
        ((22, 4), (24, 4)),
        ((12, 13), (13, 13)),
        ((3, 4), (4, 4)),
    ],
)
def test_groups_of_layers_are_of_one_size(
    counts: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert tuple(padded(count, counts) for count in counts) == expected


def vllm_holds(geometry: Geometry, tokens: int, config: TargetConfig) -> int:
    """Bytes that vLLM's own manager allocates for a prompt whose tokens all come from elsewhere."""
    from vllm import SamplingParams
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.request import Request

    dtypes = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
    specs: dict[str, Any] = {}
    for i, layer in enumerate(geometry.layers):
        shape = {
            "block_size": config.block_size,
            "num_kv_heads": max(1, layer.heads // config.num_gpus),
            "head_size": layer.head_dim,
            "dtype": dtypes[config.item_bytes(geometry)],
        }
        specs[f"layers.{i}"] = (
            FullAttentionSpec(**shape)
            if layer.window is None
            else SlidingWindowSpec(**shape, sliding_window=layer.window)
        )
    layout = next(each for each in KVCacheLayout if not each.is_block_outermost)
    vllm_config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
    )
    groups = kv_cache_utils.get_kv_cache_groups(vllm_config, specs)
    config_of_all = KVCacheConfig(num_blocks=10_000, kv_cache_tensors=[], kv_cache_groups=groups)
    manager = KVCacheManager(
        kv_cache_utils.generate_scheduler_kv_cache_config([config_of_all]),
        max_model_len=geometry.max_positions,
        scheduler_block_size=config.block_size,
        hash_block_size=config.block_size,
        enable_caching=False,
    )
    request = Request("r", [1] * (tokens + 1), SamplingParams(max_tokens=1), None)
    manager.allocate_slots(request, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True)
    held = manager.get_blocks("r").blocks
    blocks = sum(not block.is_null for group in held for block in group)
    page = kv_cache_utils._get_kv_cache_bytes_per_block(groups, layout)
    return blocks * page * config.num_gpus


@pytest.mark.slow
@settings(max_examples=60)
@given(
    windows=st.lists(st.sampled_from([None, None, 512, 100, 1]), min_size=1, max_size=30),
    tokens=st.integers(1, 4000),
    heads=st.sampled_from([1, 2, 8]),
    gpus=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([16, 32, 128]),
    cache=st.sampled_from(["auto", "fp8"]),
    quantization=st.sampled_from([None, "fp32"]),
)
@example(GEMMA * 3, 2001, 1, 1, 128, "auto", None)
@example(GEMMA * 4 + GEMMA[:2], 700, 1, 2, 16, "fp8", None)
@example(GEMMA, 639, 1, 1, 128, "auto", None)
@example(GEMMA, 638, 1, 1, 128, "auto", None)
def test_the_bytes_are_those_that_vllm_holds(
    windows: list[int | None],
    tokens: int,
    heads: int,
    gpus: int,
    block: int,
    cache: Any,
    quantization: str | None,
) -> None:
    geometry = model(windows, heads=heads, head_dim=64)
    config = TargetConfig(
        num_gpus=gpus, block_size=block, kv_cache_dtype=cache, quantization=quantization
    )
    held = vllm_holds(geometry, tokens, config)
    assert target_memory_gb(geometry, tokens, config) * 1e9 == pytest.approx(held)


@pytest.mark.slow
def test_layers_of_other_widths_are_counted_as_vllm_does() -> None:
    wide, narrow = (model([None] * 3, heads=4, head_dim=d).layers for d in (128, 64))
    geometry = model([None]).model_copy(update={"layers": (*wide, *narrow)})
    config = TargetConfig()
    assert target_memory_gb(geometry, 999, config) * 1e9 == vllm_holds(geometry, 999, config)


@given(
    windows=st.lists(st.none() | st.integers(1, 600), min_size=1, max_size=8),
    tokens=st.integers(0, 3000),
    cut=st.integers(0, 3000),
    block=st.sampled_from([16, 128]),
)
def test_what_is_written_lies_in_what_is_held(
    windows: list[int | None], tokens: int, cut: int, block: int
) -> None:
    geometry, config = model(windows), TargetConfig(block_size=block)
    begin = min(cut, tokens)
    whole = written_bytes(geometry, 0, tokens, config)
    part = written_bytes(geometry, begin, tokens, config)
    assert 0 <= part <= whole <= target_memory_gb(geometry, tokens, config) * 1e9 + 0.5
    if set(windows) == {None}:
        assert part == (tokens - begin) * geometry.width * 2


# Seconds


def rates(**changes: Any) -> Calibration:
    """Each part of a load in its own decimal place."""
    fields: dict[str, Any] = {
        "measured": "2026-11-23T00:00:00Z",
        "hardware": "h",
        "versions": {},
        "threads": 2,
        "load": 0.0,
        "read_fixed_s": 0.001,
        "read_bytes_per_s": 1e9,
        "text_tokens_per_s": 1e5,
        "align_fixed_s": 0.002,
        "align_numbers_per_s": 1e9,
        "align_flop_per_s": 1e11,
        "write_layer_s": 1e-4,
        "write_bytes_per_s": 2e9,
    }
    return Calibration.model_validate(fields | changes)


def test_a_maps_work_is_its_products(wmatrix: WMatrix) -> None:
    numbers, flop = map_work(wmatrix.manifest)
    assert numbers == len(wmatrix.mean) + wmatrix.manifest.target.width
    assert flop == map_flop(wmatrix)


def times(geometry: Geometry, tokens: int, wmatrix: WMatrix | None, **config: Any) -> Any:
    return load_times_s(
        geometry,
        tokens,
        TargetConfig.read(config),
        rates(),
        package_bytes=46_000_000,
        wmatrix=wmatrix.manifest if wmatrix else None,
    )


def test_a_copy_by_hand() -> None:
    """30 layers × 768 bytes × 2,000 tokens; the last whole block ends at 1,920."""
    found = times(model([None] * 30, heads=3, head_dim=64), 2000, None, block_size=128)
    warm = 30 * 1e-4 + 2000 * 30 * 768 / 2e9
    assert found["warm"] == pytest.approx(warm)
    assert found["cold"] == pytest.approx(warm + 0.001 + 0.046)
    assert found["hot"] == pytest.approx(30 * 1e-4 + 80 * 30 * 768 / 2e9)


def test_a_map_by_hand(wmatrix: WMatrix) -> None:
    """The tail is not loaded, but aligned with the rest."""
    geometry = wmatrix.manifest.target
    numbers, flop = map_work(wmatrix.manifest)
    found = times(geometry, 2000, wmatrix, block_size=128)
    warm = 3 * 1e-4 + (2000 - 16) * geometry.width * 2 / 2e9
    align = 0.002 + 2000 / 1e5 + 2000 * numbers / 1e9 + 2000 * flop / 1e11
    assert found["warm"] == pytest.approx(warm)
    assert found["cold"] == pytest.approx(warm + 0.047 + align)


@pytest.mark.parametrize(("tokens", "tail"), [(1920, 0), (1930, 16), (10, 16)])
def test_where_the_prefix_cache_has_all_nothing_is_loaded(
    wmatrix: WMatrix, tokens: int, tail: int
) -> None:
    found = times(wmatrix.manifest.target, tokens, wmatrix, block_size=128, tail=tail)
    assert found["hot"] == 0.0


@given(
    windows=st.lists(st.none() | st.integers(1, 600), min_size=1, max_size=8),
    tokens=st.integers(1, 5000),
    tail=st.integers(0, 600),
)
def test_hot_is_never_slower_than_warm_nor_warm_than_cold(
    windows: list[int | None], tokens: int, tail: int
) -> None:
    found = times(model(windows), tokens, None, tail=tail)
    assert 0 <= found["hot"] <= found["warm"] < found["cold"]


@given(
    fixed=st.floats(0, 1),
    rate=st.floats(1e-3, 1e12),
    units=st.lists(st.floats(1, 1e9), min_size=2, max_size=2, unique=True),
)
def test_a_line_is_found_again(fixed: float, rate: float, units: list[float]) -> None:
    small, large = sorted(units)
    points = [(u, fixed + u / rate) for u in (small, large)]
    if points[0][1] == points[1][1] or large < 1.1 * small:
        return
    again, speed = fit_line(*points)
    for u, s in points:
        assert again + u / speed == pytest.approx(s, rel=1e-6)


@given(*[st.floats(1e-9, 10)] * 2)
def test_noise_gives_no_negative_time(small: float, large: float) -> None:
    fixed, rate = fit_line((10, small), (1000, large))
    assert fixed >= 0
    assert rate > 0
    assert fixed + 1000 / rate == pytest.approx(large)


def test_every_cache_dtype_has_its_bytes() -> None:
    names = itertools.chain(("float16", "bfloat16", "float32"), ("fp8", "fp8_e4m3", "fp8_e5m2"))
    assert set(names) == set(ITEM_BYTES)
