"""Models in transformers: loading, KV states, logits, sink tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.folder import read_json, resolve_folder, weights_fingerprint
from awareness_vllm.models.malloc import keep_freed_memory
from awareness_vllm.models.tokens import load_tokenizer, prefix_ids

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a local folder, in evaluation mode; its own code never runs.

    Raises:
        UnsupportedModel: files that are not whole, or a model that transformers cannot load.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    path = resolve_folder(folder)
    config = read_json(path / "config.json")
    weights_fingerprint(path)  # names the file that is not whole; transformers does not
    keep_freed_memory()
    quantization = config.get("quantization_config")
    try:
        # An unknown method transformers would skip, and read the weights as if they were plain.
        if quantization and not AutoHfQuantizer.supports_quant_method(quantization):
            raise ValueError("transformers does not know this method")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of any type: quantization methods raise ImportError among others
        raise cannot_load(path.name, "transformers", config, error) from error
    model, keys = loaded
    if missing := sorted(keys["missing_keys"]):
        # transformers makes them up at random, with a warning.
        found = f"{len(missing)} weights are not in the files: {', '.join(missing[:3])}, …"
        raise cannot_load(path.name, "transformers", config, found)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def cannot_load(
    name: str, library: str, config: Mapping[str, Any], found: object
) -> UnsupportedModel:
    """The error about a model that a library cannot load, with what its config says about why."""
    why = " ".join(str(found).split())[:300]
    if isinstance(found, Exception):
        why = f"{type(found).__name__}: {why}"
    remedy = "check the model's files"
    expected = f"a model that {library} loads with its own code"
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method") or "an unnamed method"
        why = f"weights quantized with {method} ({why})"
        expected = "weights that are not quantized, or with a method that is installed here"
        remedy = "give the folder of the model before quantization"
        if library != "vllm":
            remedy += ", or capture with `awareness capture --engine vllm`"
    elif "auto_map" in config:
        why = f"a model that brings code of its own, auto_map in config.json ({why})"
        remedy = "use a model of a family that needs none; code of models is never run"
    return UnsupportedModel(f"{name} cannot be loaded", found=why, expected=expected, remedy=remedy)


def pad_right(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Ids of several texts, [B, T] for the longest's T; zeros after the others' ends."""
    longest = max(map(len, texts))
    rows = [[*ids, *[0] * (longest - len(ids))] for ids in texts]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def new_cache() -> DynamicCache:
    """An empty cache that keeps all tokens: transformers' default keeps only the window of sliding
    layers."""
    from transformers import DynamicCache

    return DynamicCache()


@torch.no_grad()
def padded_states(
    model: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers of several texts as cached, [B, T, H, D] each for the longest's
    T tokens. What stands after a shorter text's end is of no use: attention is causal, so it
    changes nothing before it."""
    cache = new_cache()
    model.base_model(pad_right(texts, model.device), past_key_values=cache, use_cache=True)
    return padded_cache_states(cache, cache_repeats(model.config))


def padded_cache_states(cache: DynamicCache, repeats: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers of a cache after a prefill, [B, T, H, D] each; of the `repeats`
    copies of each head, one."""
    # Typed as layers that may be empty; after a prefill none is.
    layers: list[Any] = cache.layers
    keys = [layer.keys[:, ::repeats].transpose(1, 2) for layer in layers]
    values = [layer.values[:, ::repeats].transpose(1, 2) for layer in layers]
    return keys, values


def states(model: PreTrainedModel, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers of one text as cached, [T, H, D] each."""
    keys, values = padded_states(model, [ids])
    return [key[0] for key in keys], [value[0] for value in values]


def cache_states(cache: DynamicCache, repeats: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """`padded_cache_states` of one text, [T, H, D] each."""
    keys, values = padded_cache_states(cache, repeats)
    return [key[0] for key in keys], [value[0] for value in values]


def inputs_after(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ids: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The inputs of a model that reads ids after states, per layer [T, H, D]: a cache in `dtype`,
    differentiable in the states, and the ids' positions."""
    cache = new_cache()
    for i, layer in enumerate(zip(keys, values, strict=True)):
        key, value = (state.to(dtype).transpose(0, 1)[None] for state in layer)
        cache.update(key, value, i)
    begin = len(keys[0])
    return {
        "past_key_values": cache,
        "position_ids": torch.arange(begin, begin + len(ids), device=keys[0].device)[None],
    }


def cache_repeats(config: Any) -> int:
    """How many times transformers caches each KV head: once, but in Falcon's new architecture once
    for each attention head that reads it (vLLM caches it once)."""
    if not getattr(config, "new_decoder_architecture", False):
        return 1
    return config.num_attention_heads // config.num_kv_heads


def last_logits(model: PreTrainedModel, ids: list[int], last: int, **inputs: object) -> Tensor:
    """Logits at the last `last` ids, [last, V]; `inputs` as in the model's forward."""
    # Indices, not a slice: of that torch makes a batched product, which copies the whole head.
    device = model.device
    keep = torch.arange(len(ids) - last, len(ids), device=device)
    return model(torch.tensor([ids], device=device), logits_to_keep=keep, **inputs).logits[0]


def sink_ids(target: Path) -> list[int]:
    """The target's fixed first tokens: its tokenizer's prefix, else its BOS, else token 0."""
    ids = prefix_ids(load_tokenizer(str(target)))
    if ids:
        return ids
    bos = read_json(target / "config.json").get("bos_token_id")
    return [bos if isinstance(bos, int) else 0]


def sink_states(target: Path, sink: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The target's own keys and values of its first tokens, per layer [S, H, D] float32."""
    return states(load_model(target), sink)
