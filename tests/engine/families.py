"""A tiny model with random weights of every family: for shapes and positions, not for sense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, HEAD, LENGTH, TRAINED, WINDOW = 512, 32, 1024, 256, 24
"""HEAD is the smallest head that vLLM's CPU attention has."""
SAID = 64
"""Tokens that are compared."""
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA = {
    "hidden_size": 4 * HEAD,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
EVERY_HEAD = {**LLAMA, "num_key_value_heads": 4}
GEMMA = {**LLAMA, "head_dim": HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": HEAD}
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 4 * HEAD, "n_positions": LENGTH}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return LLAMA | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama, llama3": (
        "llama",
        rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED),
    ),
    "llama, yarn": ("llama", rope("yarn", **STRETCHED)),
    "mistral": ("mistral", {**LLAMA, "head_dim": HEAD, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, windows": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": HEAD}),
    "gemma": ("gemma", {**LLAMA, "head_dim": HEAD}),
    "gemma2": ("gemma2", GEMMA | ALTERNATING),
    "gemma3": ("gemma3_text", GEMMA | ALTERNATING),
    "phi": ("phi", {**EVERY_HEAD, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", LLAMA | {"pad_token_id": 0}),
    "phi3, longrope": (
        "phi3",
        rope(
            "longrope",
            short_factor=[1.0 + 0.1 * i for i in range(HEAD // 2)],
            long_factor=[1.0 + 0.5 * i for i in range(HEAD // 2)],
        )
        | {"pad_token_id": 0, "original_max_position_embeddings": TRAINED},
    ),
    "gpt-neox": ("gpt_neox", {**EVERY_HEAD, "rotary_pct": 0.25}),
    "gpt-j": ("gptj", {**OLD, "rotary_dim": 16}),
    "gpt2": ("gpt2", OLD),
    "starcoder": ("gpt_bigcode", {**OLD, "multi_query": True}),
    "opt": (
        "opt",
        {
            **EVERY_HEAD, "ffn_dim": 128, "word_embed_proj_dim": 4 * HEAD,
            "do_layer_norm_before": True,
        },
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 4 * HEAD}),
    "mpt": (
        "mpt",
        {"n_layers": 2, "n_heads": 4, "d_model": 4 * HEAD, "max_seq_len": LENGTH},
    ),
    "falcon": ("falcon", {**LLAMA, "multi_query": True}),
    "falcon, new": (
        "falcon",
        {**LLAMA, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon, alibi": (
        "falcon",
        {**LLAMA, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "cohere": ("cohere", LLAMA),
    "cohere2": ("cohere2", {**LLAMA, "head_dim": HEAD, "sliding_window": WINDOW} | ALTERNATING),
    "dbrx": (
        "dbrx",
        {
            "d_model": 4 * HEAD, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH,
            # As the checkpoint has it, and the same theta where transformers reads it.
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 5e5},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "glm": ("glm", {**LLAMA, "head_dim": HEAD, "pad_token_id": 0}),
    "glm4": ("glm4", {**LLAMA, "head_dim": HEAD, "pad_token_id": 0}),
    "olmo": ("olmo", EVERY_HEAD),
    "olmo2": ("olmo2", LLAMA),
    "granite": ("granite", LLAMA),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "exaone4": ("exaone4", {**LLAMA, "sliding_window": WINDOW} | ALTERNATING),
    "stablelm": ("stablelm", {**LLAMA, "partial_rotary_factor": 0.25}),
    "starcoder2": ("starcoder2", {**LLAMA, "sliding_window": WINDOW}),
    "ernie4.5": ("ernie4_5", {**LLAMA, "head_dim": HEAD}),
    "helium": ("helium", {**LLAMA, "head_dim": HEAD}),
    "nemotron": ("nemotron", {**LLAMA, "partial_rotary_factor": 0.5}),
}  # fmt: skip
"""Each family's model type, and what its config says; the first of each line is a plain one."""
UNSERVED = {
    "mpt": "vLLM 0.32 has no MPT",
    "helium": "vLLM 0.32 has no Helium",
    "dbrx": "vLLM 0.32 and 0.33 load no DBRX: they look for experts.w13_weight, which is renamed",
    "qwen2, windows": "vLLM 0.32 wants windows in all of its layers or in none",
}
"""Families that transformers runs and vLLM does not."""
IN_EVERY_RUN = {"llama, yarn", "gpt-j", "gpt2", "bloom", "exaone4"}
"""Rotary halves (scaled), interleaved pairs, learned positions, ALiBi, and windows beside layers
without positions; the others are for `make nightly`."""


def build(name: str) -> PreTrainedModel:
    """The family's tiny model, in float32, its weights so large that positions count."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = FAMILIES[name]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **ids, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # a tied embedding as large as the rest would only echo
                width = 0.2 if parameter is embedding else 3
                parameter.normal_(0, width / parameter.shape[1] ** 0.5)
    return model


def save(name: str, folder: Path) -> Path:
    """A folder that vLLM serves: the family's model in float32, since random weights are full of
    near-ties in bfloat16, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    build(name).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
