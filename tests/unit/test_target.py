"""How a target is served: what is refused, what is a risk, and which names are near."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.cli import check as check_
from awareness_vllm.compatibility.context import CheckContext, MemoryInfo
from awareness_vllm.compatibility.models import Model
from awareness_vllm.compatibility.risks import serving_risks
from awareness_vllm.compatibility.target import ITEM_BYTES, QUANTIZATIONS, CacheDtype, TargetConfig
from awareness_vllm.errors import BadInput, ContextTooLong
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.wmatrix.certificate import TAIL
from awareness_vllm.wmatrix.registry import Registry

pytestmark = pytest.mark.unit

FULL = LayerGeometry(heads=8, head_dim=64, positions=Positions(scheme="none"))


def model(*layers: LayerGeometry, **changes: Any) -> Geometry:
    fields: dict[str, Any] = {
        "name": "tiny",
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 16,
        "vocab_size": 100,
        "max_positions": 4096,
        "layers": layers or (FULL,),
        "weights": "w",
        "tokenizer": "t",
    }
    return Geometry(**fields | changes)


def test_nothing_has_to_be_said() -> None:
    assert TargetConfig.read(None) == TargetConfig.read({}) == TargetConfig()
    assert TargetConfig().tail == TAIL == ServingConfig(store="s").tail
    config = TargetConfig(num_gpus=2)
    assert TargetConfig.read(config) is config


def test_the_published_example_is_read() -> None:
    """Of the seed: its fields, its values."""
    published = {
        "quantization": "fp16",
        "context_length": 128_000,
        "custom_fine_tune": "my-checkpoint-v2",
    }
    config = TargetConfig.read(published)
    assert config.model_dump(exclude_unset=True) == published
    llama = model(max_positions=131_072)
    (risk,) = serving_risks(config, llama, 1000)
    assert "my-checkpoint-v2" in risk.description


@pytest.mark.parametrize(
    ("given", "what", "near"),
    [
        ({"quantisation": "fp16"}, "field", "quantization"),
        ({"max_model_len": 10}, "field", None),
        ({"gpus": 2}, "field", "num_gpus"),
        ({"quantization": "fp-16"}, "quantization", "fp16"),
        ({"quantization": "AWQ"}, "quantization", "awq"),
        ({"quantization": "zzz"}, "quantization", None),
        ({"kv_cache_dtype": "fp8_e4m2"}, "kv_cache_dtype", "fp8_e4m3"),
        ({"kv_cache_dtype": None}, "kv_cache_dtype", None),
    ],
)
def test_an_unknown_name_is_refused_with_those_nearest(
    given: dict[str, Any], what: str, near: str | None
) -> None:
    with pytest.raises(BadInput, match=f"unknown {what}") as caught:
        TargetConfig.read(given)
    assert caught.value.expected
    assert (near in caught.value.remedy) if near else caught.value.remedy is None


@pytest.mark.parametrize(
    "given",
    [
        {"context_length": 0},
        {"context_length": -5},
        {"context_length": 10.0},
        {"context_length": "4096"},
        {"num_gpus": 0},
        {"num_gpus": True},
        {"memory_gb": -1},
        {"memory_gb": 0},
        {"memory_gb": float("nan")},
        {"memory_gb": float("inf")},
        {"memory_gb": "80"},
        {"block_size": 0},
        {"tail": -1},
        {"custom_fine_tune": ""},
        {"custom_fine_tune": 3},
    ],
)
def test_a_wrong_value_is_refused_with_its_field(given: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(given))):
        TargetConfig.read(given)


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(BadInput, match="not a mapping"):
        TargetConfig.read(["fp16"])  # type: ignore[arg-type]


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


@given(
    st.dictionaries(
        st.sampled_from(list(TargetConfig.model_fields)) | st.text(max_size=8),
        ANYTHING | st.lists(ANYTHING, max_size=2) | st.sampled_from(list(QUANTIZATIONS)),
        max_size=4,
    )
)
def test_any_mapping_is_read_or_refused(given: dict[str, Any]) -> None:
    try:
        config = TargetConfig.read(given)
    except BadInput:
        return
    assert config.model_dump(exclude_unset=True) == given


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64])
def test_heads_are_shared_out_or_replicated(gpus: int) -> None:
    TargetConfig(num_gpus=gpus).check(model())


@pytest.mark.parametrize("gpus", [3, 6, 12])
def test_heads_that_cannot_be_shared_out(gpus: int) -> None:
    with pytest.raises(BadInput, match="8 KV heads"):
        TargetConfig(num_gpus=gpus).check(model())


def test_every_kind_of_layer_has_to_be_shared_out() -> None:
    three = FULL.model_copy(update={"heads": 3})
    TargetConfig(num_gpus=3).check(model(three))
    with pytest.raises(BadInput, match="8 KV heads"):
        TargetConfig(num_gpus=3).check(model(three, FULL))


def test_a_context_beyond_the_positions() -> None:
    TargetConfig(context_length=4096).check(model())
    with pytest.raises(BadInput, match="context_length") as caught:
        TargetConfig(context_length=4097).check(model())
    assert "4096" in str(caught.value)


@pytest.mark.parametrize("quantization", [*QUANTIZATIONS, None])
@pytest.mark.parametrize("cache", get_args(CacheDtype))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cache_is_in_the_dtype_of_attention_or_in_fp8(
    quantization: str | None, cache: str, dtype: str
) -> None:
    config = TargetConfig.read({"quantization": quantization, "kv_cache_dtype": cache})
    computed = QUANTIZATIONS.get(quantization or "") or dtype
    wrong = cache in ("float16", "bfloat16") and cache != computed
    if wrong or (quantization, cache) == ("fp8", "fp8_e5m2"):
        with pytest.raises(BadInput, match="contradict"):
            config.check(model(dtype=dtype))
        return
    config.check(model(dtype=dtype))
    expected = 1 if cache.startswith("fp8") else ITEM_BYTES[computed]
    assert config.item_bytes(model(dtype=dtype)) == expected


def test_float32_weights_are_served_in_sixteen_bits_unless_asked() -> None:
    assert TargetConfig().item_bytes(model(dtype="float32")) == 2
    assert TargetConfig(quantization="fp32").item_bytes(model()) == 4


@pytest.mark.parametrize(
    ("config", "tokens", "impact", "says"),
    [
        ({"memory_gb": 1e-4}, 1000, "high", "GB of each device"),
        ({}, 16, "low", "nothing is loaded"),
        ({"custom_fine_tune": "mine"}, 500, "high", "mine has other weights"),
        ({"quantization": "int8"}, 500, "medium", "int8 weights"),
        ({"quantization": "gptq"}, 500, "high", "gptq weights"),
        ({"kv_cache_dtype": "fp8"}, 500, "low", "rounds"),
    ],
)
def test_what_forbids_nothing_is_a_risk(
    config: dict[str, Any], tokens: int, impact: str, says: str
) -> None:
    (risk,) = serving_risks(TargetConfig.read(config), model(), tokens)
    assert risk.impact == impact
    assert says in risk.description


def test_without_risks_there_are_none() -> None:
    config = {"quantization": "bf16", "context_length": 1001, "memory_gb": 80, "num_gpus": 4}
    assert serving_risks(TargetConfig.read(config), model(), 1000) == ()


def test_more_devices_have_room_for_more() -> None:
    """2,048 bytes a token: 1,024 tokens are 2.1 MB, on two devices 1.05 each."""
    small = {"memory_gb": 0.0015}
    assert len(serving_risks(TargetConfig.read(small), model(), 1024)) == 1
    assert serving_risks(TargetConfig.read(small | {"num_gpus": 2}), model(), 1024) == ()


@pytest.mark.parametrize(("context", "tokens"), [(1000, 999), (None, 4095)])
def test_a_memory_that_fills_the_context_is_refused(context: int | None, tokens: int) -> None:
    """No token is left to ask and to answer with."""
    target = Model("tiny", model())

    def refusal(count: int) -> Any:
        config = TargetConfig(context_length=context)
        memory = MemoryInfo("m", target, count)
        return CheckContext(memory, target, config, Registry(), count).refusal

    assert refusal(tokens - 1) is None
    assert isinstance(refusal(tokens), ContextTooLong)


def test_the_command_has_an_option_for_every_field() -> None:
    parser = argparse.ArgumentParser()
    check_.add_arguments(parser)
    options: dict[str, Any] = {
        "quantization": "fp16",
        "kv_cache_dtype": "fp8",
        "context_length": 1000,
        "num_gpus": 2,
        "memory_gb": 79.5,
        "block_size": 128,
        "tail": 0,
        "reread": 24,
        "custom_fine_tune": "1234567",
    }
    assert set(options) == set(TargetConfig.model_fields)
    argv = ["--target", "t"]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    found = vars(parser.parse_args(argv))
    assert TargetConfig.read({name: found[name] for name in options}) == TargetConfig(**options)
