"""Geometry from the config.json of the model families that matter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.geometry import Geometry, Positions, from_config

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
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "twist": 2}}, "twist"),
        ({"rope_theta": None}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read(LLAMA | change)


def test_unknown_manifest_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        Geometry.model_validate(read(LLAMA).model_dump() | {"surprise": 1})


def test_no_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="Remedy"):
        Geometry.from_folder(tmp_path / "nothing")


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
        geometries.append(Geometry.from_folder(folder))
    first, same, other, another = geometries
    assert first.same_model(same)
    assert len({g.weights for g in (first, other, another)}) == 3
    assert not first.same_model(other)
