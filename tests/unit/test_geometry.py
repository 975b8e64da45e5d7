"""Geometry from the config.json of the model families that matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models import describe as module
from awareness_vllm.models.describe import from_config, geometry_of
from awareness_vllm.models.geometry import Geometry, Positions

pytestmark = pytest.mark.unit

GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "hidden_size": 640,
    "vocab_size": 262144,
    "head_dim": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "torch_dtype": "float16",
    "hidden_size": 576,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}


def read(config: dict[str, Any]) -> Geometry:
    return from_config(copy.deepcopy(config), name="model", weights="w", tokenizer="t")


def test_gemma3_has_two_thetas_and_windows() -> None:
    geometry = read(GEMMA)
    local = Positions(scheme="rope", theta=1e4, rotary_dim=256)
    assert [layer.positions for layer in geometry.layers] == [
        local,
        local,
        Positions(scheme="rope", theta=1e6, rotary_dim=256),
    ]
    assert [layer.window for layer in geometry.layers] == [512, 512, None]
    assert (geometry.key_width, geometry.width, geometry.dtype) == (768, 1536, "bfloat16")


def test_text_config_of_a_multimodal_model_is_read() -> None:
    nested = {"model_type": "gemma3", "text_config": GEMMA}
    assert read(nested).layers == read(GEMMA).layers


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e5},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
    ],
    ids=["top level", "flat rope_parameters"],
)
def test_llama_is_the_same_in_old_and_new_configs(rope: dict[str, Any]) -> None:
    geometry = read(LLAMA | rope)
    assert len(geometry.layers) == 30
    assert {layer.positions.theta for layer in geometry.layers} == {1e5}
    assert {(layer.heads, layer.head_dim, layer.window) for layer in geometry.layers} == {
        (3, 64, None)
    }
    assert geometry.dtype == "float16"


SIZES = {"vocab_size": 100}
OLD = SIZES | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
PLAIN = SIZES | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
WHOLE = Positions(scheme="rope", theta=1e4, rotary_dim=32)
HALF = WHOLE.model_copy(update={"rotary_dim": 16})
INTERLEAVED, HALF_INTERLEAVED = (
    scheme.model_copy(update={"interleaved": True}) for scheme in (WHOLE, HALF)
)
NONE, ALIBI, LEARNED = (Positions(scheme=name) for name in ("none", "alibi", "learned"))
LONG = PLAIN | {
    "model_type": "phi3",
    "pad_token_id": 0,
    "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
}
Stated = tuple[dict[str, Any], int, Positions | list[Positions], list[int | None]]
ANY, LOCAL_FIRST = [None, None], [8, None]
STATED: dict[str, Stated] = {
    "gpt2": (OLD, 4, LEARNED, ANY),
    "gpt_bigcode": (OLD, 1, LEARNED, ANY),
    "gptj": (OLD | {"rotary_dim": 16, "rotary": True}, 4, HALF_INTERLEAVED, ANY),
    "bloom": (SIZES | {"hidden_size": 128, "n_layer": 2, "n_head": 4}, 4, ALIBI, ANY),
    "mpt": (SIZES | {"d_model": 128, "n_layers": 2, "n_heads": 4}, 4, ALIBI, ANY),
    "gpt_neox": (PLAIN | {"rotary_pct": 0.5, "rotary_emb_base": 10000}, 2, HALF, ANY),
    "phi": (PLAIN | {"partial_rotary_factor": 0.5}, 2, HALF, ANY),
    "opt": (PLAIN, 2, LEARNED, ANY),
    "falcon": (PLAIN | {"multi_query": True, "num_kv_heads": 4}, 1, WHOLE, ANY),
    "cohere": (PLAIN | {"rope_theta": 1e4}, 2, INTERLEAVED, ANY),
    "cohere2": (
        PLAIN | TWO_KINDS | {"position_embedding_type": "rope_gptj", "head_dim": 32},
        2,
        [INTERLEAVED, NONE],
        LOCAL_FIRST,
    ),
    "exaone4": (PLAIN | TWO_KINDS, 2, [WHOLE, NONE], LOCAL_FIRST),
    "smollm3": (
        PLAIN | {"no_rope_layers": [1, 0], "rope_theta": 1e4, "pad_token_id": 0},
        2,
        [WHOLE, NONE],
        ANY,
    ),
    "mistral": (PLAIN | {"sliding_window": 8}, 2, WHOLE, [8, 8]),
    "starcoder2": (PLAIN | {"sliding_window": 0}, 2, WHOLE, ANY),
    "qwen2": (
        PLAIN | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        2,
        WHOLE,
        [None, 8],
    ),
    "gemma2": (PLAIN | {"sliding_window": 8, "head_dim": 32}, 2, WHOLE, LOCAL_FIRST),
}


@pytest.mark.parametrize("kind", list(STATED))
def test_defaults_of_families_are_known(kind: str) -> None:
    config, heads, positions, windows = STATED[kind]
    layers = read(config | {"model_type": kind}).layers
    each = positions if isinstance(positions, list) else [positions] * 2
    assert [layer.positions for layer in layers] == each
    assert [layer.window for layer in layers] == windows
    assert {(layer.heads, layer.head_dim) for layer in layers} == {(heads, 32)}


def test_falcons_without_multi_query_and_with_alibi() -> None:
    falcon = PLAIN | {"model_type": "falcon"}
    assert read(falcon | {"new_decoder_architecture": True, "num_kv_heads": 2}).layers[0].heads == 2
    single = read(falcon | {"multi_query": False, "alibi": True}).layers[0]
    assert (single.heads, single.positions) == (4, ALIBI)


def test_dbrx_whose_engines_rotate_by_different_thetas_is_refused() -> None:
    # As published: transformers 5 reads rope_parameters, vLLM attn_config.
    sizes = {"d_model": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 9, "max_seq_len": 64}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000}
    dbrx = sizes | {"model_type": "dbrx", "attn_config": attention}
    with pytest.raises(UnsupportedModel, match=r"rope_parameters.*500000") as caught:
        read(dbrx)
    assert "differ on positions" in str(caught.value)
    layer = read(dbrx | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).layers[0]
    assert (layer.heads, layer.head_dim, layer.positions.theta) == (2, 32, 5e5)


def test_a_model_without_a_limit_has_vllms() -> None:
    bloom = {"model_type": "bloom", "vocab_size": 9, "hidden_size": 64, "n_layer": 1, "n_head": 2}
    assert read(bloom).max_positions == 2048
    assert read(bloom | {"seq_length": 512}).max_positions == 512


def test_longrope_is_that_of_the_tokens_read_at_once() -> None:
    short, exact, long = (
        from_config(copy.deepcopy(LONG), name="m", weights="w", tokenizer="t", tokens=tokens)
        for tokens in (None, 16, 17)
    )
    assert short == exact
    assert short.layers[0].positions.factors == (1.0,) * 16
    assert long.layers[0].positions.factors == (2.0,) * 16
    assert not short.same_model(long)
    sharper = LONG | {"rope_scaling": LONG["rope_scaling"] | {"attention_factor": 3.0}}
    with pytest.raises(UnsupportedModel, match="attention_factor=3"):
        read(sharper)


def test_a_model_type_that_transformers_lacks_is_read_as_it_stands() -> None:
    result = read(PLAIN | {"model_type": "novel", "rope_theta": 1e4})
    assert result.layers[0].positions == WHOLE


def test_partial_rotary_factor_narrows_the_rotation() -> None:
    assert read(LLAMA | {"partial_rotary_factor": 0.5}).layers[0].positions.rotary_dim == 32


def test_no_kv_head_count_means_one_per_attention_head() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert read(config).layers[0].heads == 9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank=512"),
        ({"ssm_state_size": 16}, "ssm_state_size=16"),
        ({"model_type": "mamba"}, "state_size=16"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"layer_types": ["linear_attention"] * 30}, "linear_attention"),
        ({"v_head_dim": 32}, "v_head_dim=32"),
        ({"rope_ratio": 50}, "rope_ratio=50"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk"),
        ({"position_embedding_type": "relative"}, "relative"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor=4"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "twist": 2}}, "twist"),
        ({"rope_theta": None}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_unsupported_configs_are_refused_by_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read(LLAMA | change)


def test_unknown_manifest_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="token_nll"):
        Geometry.model_validate(read(LLAMA).model_dump() | {"token_nll": 1})


def test_no_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="Remedy"):
        geometry_of(tmp_path / "nothing")


def test_fingerprint_sees_a_change_in_any_tensor(tmp_path: Path) -> None:
    geometries = []
    for name, changed in (("a", None), ("b", None), ("c", "x"), ("d", "y")):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {key: torch.zeros(5000) for key in ("x", "y")}
        if changed:
            tensors[changed][2500] = 1
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(LLAMA))
        (folder / "tokenizer.json").write_text("{}")
        geometries.append(geometry_of(folder))
    first, same, other, another = geometries
    assert first.same_model(same)
    assert len({g.weights for g in (first, other, another)}) == 3
    assert not first.same_model(other)


@pytest.fixture
def reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Geometry, bool]]:
    """Reads a config from a folder as a new process would: the geometry, and whether it was read
    with transformers."""
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))

    read = []

    def counted(*arguments: Any, **more: Any) -> Geometry:
        read.append(arguments)
        return from_config(*arguments, **more)

    monkeypatch.setattr(module, "from_config", counted)

    def of(
        config: dict[str, Any], folder: str = "model", tokens: int | None = None
    ) -> tuple[Geometry, bool]:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        save_file({"x": torch.tensor([*folder.encode()])}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text("{}")
        read.clear()
        module._from_folder.cache_clear()
        module._fingerprints.cache_clear()
        return geometry_of(path, tokens), bool(read)

    return of


def test_a_configs_geometry_is_cached(reading: Callable[..., tuple[Geometry, bool]]) -> None:
    first, read = reading(GEMMA)
    assert read
    assert reading(GEMMA) == (first, False)
    assert reading(GEMMA | {"head_dim": 128})[0].layers[0].head_dim == 128
    assert reading(GEMMA, tokens=9) == (first, True)
    other, read = reading(GEMMA, "other")
    assert not read
    assert (other.name, other.layers) == ("other", first.layers)
    assert not other.same_model(first)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe"])
def test_a_damaged_cache_is_replaced(
    reading: Callable[..., tuple[Geometry, bool]], tmp_path: Path, damage: bytes
) -> None:
    first, _ = reading(LLAMA)
    (cached,) = (tmp_path / "home" / "geometries").iterdir()
    cached.write_bytes(damage)
    assert reading(LLAMA) == (first, True)
    assert reading(LLAMA) == (first, False)


def test_the_cache_depends_on_the_code_that_reads_configs(
    reading: Callable[..., tuple[Geometry, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(LLAMA)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda _: "another")
    assert reading(LLAMA)[1]
    assert not reading(LLAMA)[1]
    monkeypatch.setattr(module, "file_digest", lambda _: "other code")
    assert reading(LLAMA)[1]


def test_a_read_only_home_has_no_cache(
    reading: Callable[..., tuple[Geometry, bool]], tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    assert [reading(LLAMA)[1] for _ in range(2)] == [True, True]
