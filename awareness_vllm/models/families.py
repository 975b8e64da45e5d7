"""Configs of model families, read into the fields of a geometry: heads, windows, positions.

transformers' own config classes read the fields, so that old names and defaults mean here what
they mean to the engines; what the classes leave to the models' code is in the tables below.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.geometry import LayerGeometry, Positions

LEARNED = frozenset({"gpt2", "gpt_bigcode", "opt"})
ALIBI = frozenset({"bloom", "mpt"})
INTERLEAVED = frozenset(
    {"cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium"}
)
"""Families that rotate neighbouring dims as a pair (GPT-J)."""
ROTARY_WHERE_SLIDING = frozenset({"cohere2", "exaone4"})
"""Families whose full-attention layers have no positions, where other layers have a window."""
FIXED_THETA = {"gptj": 10000.0}
"""Families whose config has no rotary parameters."""

REFUSED = {
    "kv_lora_rank": "multi-head latent attention keeps no per-head keys",
    "ssm_state_size": "a recurrent state is not a KV cache",
    "state_size": "a recurrent state is not a KV cache",
    "mamba_d_state": "a recurrent state is not a KV cache",
    "lru_width": "a recurrent state is not a KV cache",
    "conv_L_cache": "a convolution's state is not a KV cache",
    "linear_num_key_heads": "linear attention keeps a state and no keys",
    "linear_attn_config": "linear attention keeps a state and no keys",
    "is_encoder_decoder": "cross-attention reads an encoder's states",
    "add_cross_attention": "cross-attention reads an encoder's states",
    "cross_attention_layers": "cross-attention reads an encoder's states",
    "num_kv_shared_layers": "layers share one cache",
    "block_configs": "every layer has heads of its own",
    "attention_chunk_size": "attention within chunks",
    "dual_chunk_attention_config": "positions begin anew in every chunk",
}
"""Fields that, when set, rule out dense attention KV of one shape, with the reason."""
POSITIONAL = re.compile("rope|rotary|alibi|nope|posi|ntk|yarn|logn")
KNOWN = (
    "alibi",
    "max_position_embeddings",
    "n_positions",
    "no_rope_layer_interval",
    "no_rope_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "position_embedding_type",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
)
"""Fields with positional names that are read, here or by transformers."""
STATED = {"rope": "rope", "rope_gptj": "rope", "absolute": "learned", "alibi": "alibi"}
"""The scheme that each `position_embedding_type` stands for."""
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")
UNBOUNDED = 2048
"""Positions of a model without a limit (BLOOM): vLLM's default."""

Rope = Callable[[dict[str, Any], "Reading"], dict[str, Any]]
ROPES: dict[str, Rope] = {}
ROPE_KEYS: dict[str, frozenset[str]] = {}
ANY_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
IN_IMAGES = frozenset({"mrope_section", "mrope_interleaved"})
"""Keys about images; a text's positions are the same in every section."""


class Reading:
    """The config of the model `name`, with the names and defaults of transformers' class (`view`),
    for sequences of at most `tokens`."""

    def __init__(self, raw: dict[str, Any], name: str, tokens: int | None) -> None:
        self.name, self.tokens = name, tokens
        self.view = _view(raw, name)
        self.family = self.need("model_type")

    def get(self, field: str) -> Any:
        """A field, None where it is missing."""
        return getattr(self.view, field, None)

    def need(self, field: str) -> Any:
        """A field. Raises UnsupportedModel where it is missing."""
        if self.get(field) is None:
            raise UnsupportedModel(f"{self.name}: config.json lacks a field", expected=field)
        return self.get(field)

    def refuse(self, why: str, found: object, expected: object) -> UnsupportedModel:
        """The error about an unsupported field of this config."""
        return UnsupportedModel(f"{self.name}: {why}", found=found, expected=expected)


def read(raw: dict[str, Any], name: str, tokens: int | None) -> dict[str, Any]:
    """The fields of a `Geometry` that a config decides.

    Raises:
        UnsupportedModel: no dense attention KV, or an unknown positional encoding.
    """
    reading = Reading(raw, name, tokens)
    for field, why in REFUSED.items():
        if reading.get(field):
            found = f"{field}={reading.get(field)}"
            raise reading.refuse(why, found, "dense attention KV")
    for field in sorted(raw):
        if raw[field] and POSITIONAL.search(field) and field not in KNOWN:
            found = f"{field}={raw[field]}"
            raise reading.refuse("unknown positional field", found, KNOWN)
    count, attention_heads = reading.need("num_hidden_layers"), reading.need("num_attention_heads")
    hidden = reading.need("hidden_size")
    head_dim = reading.get("head_dim") or hidden // attention_heads
    if (reading.get("v_head_dim") or head_dim) != head_dim:
        found = f"v_head_dim={reading.get('v_head_dim')}"
        raise reading.refuse("values are not as wide as keys", found, head_dim)
    types = reading.get("layer_types") or [None] * count
    return {
        "model_type": reading.family,
        "hidden_size": hidden,
        "vocab_size": reading.need("vocab_size"),
        "max_positions": _max_positions(reading),
        "layers": tuple(
            LayerGeometry(
                heads=_heads(reading, attention_heads),
                head_dim=head_dim,
                positions=_positions(reading, i, types[i], head_dim),
                window=_window(reading, types[i]),
            )
            for i in range(count)
        ),
    }


def _view(raw: dict[str, Any], name: str) -> Any:
    """The config as transformers' class reads it; its raw fields for an unknown model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        return SimpleNamespace(**raw)
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
    except Exception as error:  # its validators raise any type
        raise UnsupportedModel(
            f"{name}: transformers cannot read config.json", found=" ".join(str(error).split())
        ) from error
    return config.get_text_config()


def _max_positions(reading: Reading) -> int:
    for field in LENGTHS:
        if reading.get(field):
            return int(reading.get(field))
    return (
        UNBOUNDED if _scheme_without_rotation(reading) == "alibi" else int(reading.need(LENGTHS[0]))
    )


def _heads(reading: Reading, attention_heads: int) -> int:
    """KV heads of each layer; `multi_query` says nothing of Falcon's new architecture."""
    if reading.get("multi_query") and not reading.get("new_decoder_architecture"):
        return 1
    inner = getattr(reading.get("attn_config"), "kv_n_heads", None)
    fields = (reading.get(field) for field in ("num_kv_heads", "num_key_value_heads"))
    return next((int(count) for count in (inner, *fields) if count), attention_heads)


def _window(reading: Reading, kind: str | None) -> int | None:
    """A layer's sliding window in tokens, None (or 0 in the config) for full attention."""
    if kind not in (None, "full_attention", "sliding_attention"):
        found = f"layer_types with {kind!r}"
        raise reading.refuse(
            "a layer's kind is not supported", found, "full_attention or sliding_attention"
        )
    return None if kind == "full_attention" else reading.get("sliding_window") or None


def _scheme_without_rotation(reading: Reading) -> str | None:
    """The scheme of a family whose keys are not rotated; None where they are."""
    if reading.family == "mpt" and not getattr(reading.get("attn_config"), "alibi", True):
        return "learned"
    if reading.family in ALIBI or reading.get("alibi"):
        return "alibi"
    return "learned" if reading.family in LEARNED else None


def _positions(reading: Reading, layer: int, kind: str | None, head_dim: int) -> Positions:
    """The positional encoding of one layer. Raises UnsupportedModel where it is unknown."""
    scheme = _scheme_without_rotation(reading)
    stated = reading.get("position_embedding_type")
    if stated and STATED.get(stated) != (scheme or "rope"):
        found = f"position_embedding_type={stated!r}"
        raise reading.refuse("positions are not supported", found, sorted(STATED))
    if scheme:
        return Positions(scheme=scheme)
    rotary = reading.get("no_rope_layers")  # despite its name, 1 where a layer is rotary
    if rotary and not rotary[layer]:
        return Positions(scheme="none")
    everywhere = reading.family not in ROTARY_WHERE_SLIDING or not reading.get("sliding_window")
    if kind == "full_attention" and not everywhere:
        return Positions(scheme="none")
    return _rotary(reading, kind, head_dim)


def _rotary(reading: Reading, kind: str | None, head_dim: int) -> Positions:
    """The rotary parameters of one layer type; `rope_parameters` is flat or nested by type."""
    rope = dict(reading.get("rope_parameters") or reading.get("rope_scaling") or {})
    rope = dict(rope.get(kind, rope) or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or reading.get("rope_theta") or FIXED_THETA.get(reading.family)
    inner = getattr(reading.get("attn_config"), "rope_theta", None)
    if inner is not None and inner != theta:  # DBRX: vLLM rotates by this one
        raise reading.refuse(
            "vLLM and transformers differ on positions",
            f"attn_config.rope_theta={inner}, where transformers reads {theta}",
            f'"rope_parameters": {{"rope_type": "default", "rope_theta": {inner}}} in config.json, '
            "so that both rotate alike",
        )
    where = f"positions of {kind or 'its'} layers are not supported"
    if theta is None or rope_type not in ROPES:
        found = f"rope_type={rope_type!r}, rope_theta={theta}"
        raise reading.refuse(where, found, f"a rope_theta, and of rope_type {sorted(ROPES)}")
    known = ANY_ROPE | IN_IMAGES | ROPE_KEYS[rope_type]
    if unknown := {key: value for key, value in rope.items() if value and key not in known}:
        raise reading.refuse(where, f"{rope_type!r} with {unknown}", sorted(known))
    partial = rope.get("partial_rotary_factor") or reading.get("partial_rotary_factor") or 1.0
    fields = ROPES[rope_type](rope, reading)
    return Positions(
        scheme="rope" if rope_type == "default" else rope_type,
        theta=float(theta),
        rotary_dim=reading.get("rotary_dim") or int(head_dim * partial),
        interleaved=reading.family in INTERLEAVED,
        **fields,
    )


def rope(name: str, *keys: str) -> Callable[[Rope], Rope]:
    """Register the function that turns these `keys` of a `rope_type` into fields of `Positions`."""

    def register(function: Rope) -> Rope:
        ROPES[name], ROPE_KEYS[name] = function, frozenset(keys)
        return function

    return register


def _number(rope: dict[str, Any], key: str, reading: Reading) -> float:
    """A number among the rotary parameters. Raises UnsupportedModel where there is none."""
    if not isinstance(rope.get(key), (int, float)):
        raise reading.refuse("a rotary parameter is missing", f"{key}={rope.get(key)}", "a number")
    return float(rope[key])


@rope("default")
def _default(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return {}


@rope("linear", "factor")
def _linear(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return {"factor": _number(rope, "factor", reading)}


@rope("dynamic", "factor", "original_max_position_embeddings")
def _dynamic(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Dynamic NTK: vLLM's table is the one for `max_position_embeddings` tokens, and so is
    transformers' for shorter texts; longer ones are not captured."""
    length = int(reading.need("max_position_embeddings"))
    return {"factor": _number(rope, "factor", reading), "original": length, "length": length}


@rope("llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
def _llama3(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return {
        "factor": _number(rope, "factor", reading),
        "original": int(_number(rope, "original_max_position_embeddings", reading)),
        "beta_slow": _number(rope, "low_freq_factor", reading),
        "beta_fast": _number(rope, "high_freq_factor", reading),
    }


@rope(
    "yarn",
    "factor",
    "original_max_position_embeddings",
    "beta_slow",
    "beta_fast",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
def _yarn(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    factor = _number(rope, "factor", reading)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = mscale(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    factor_of_attention = rope.get("attention_factor")
    return {
        "factor": factor,
        "original": int(_number(rope, "original_max_position_embeddings", reading)),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "truncate": rope.get("truncate", True),
        "scale": scale if factor_of_attention is None else float(factor_of_attention),
    }


@rope(
    "longrope",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "factor",
    "attention_factor",
)
def _longrope(rope: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """LongRoPE: short factors up to `original_max_position_embeddings` tokens, long ones beyond;
    transformers counts the tokens of the text, vLLM those of `--max-model-len`."""
    original = int(_number(rope, "original_max_position_embeddings", reading))
    ratio = reading.need("max_position_embeddings") / original
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    # transformers uses these numbers, vLLM ignores them.
    for key, derived in (("factor", ratio), ("attention_factor", scale)):
        if rope.get(key) is not None and not math.isclose(rope[key], derived):
            found = f"longrope with {key}={rope[key]}"
            raise reading.refuse("vLLM and transformers differ on positions", found, derived)
    long = reading.tokens is not None and reading.tokens > original
    factors = rope.get("long_factor" if long else "short_factor")
    return {
        "factors": tuple(map(float, factors or ())),
        "original": original,
        "scale": scale,
    }
