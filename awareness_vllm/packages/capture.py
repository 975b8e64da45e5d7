"""Capture with transformers: read a text with the source model, keep its KV states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.anchors.spans import Tokens, load_tokenizer, prefix_ids, tokenize
from awareness_vllm.errors import BadInput
from awareness_vllm.geometry import Geometry, resolve_folder
from awareness_vllm.memory import keep_freed_memory
from awareness_vllm.packages.file import Package, build
from awareness_vllm.provenance import versions

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model for reading; eager errors for anything but a local folder."""
    from transformers import AutoModelForCausalLM

    path = resolve_folder(folder)
    keep_freed_memory()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def read_tokens(folder: str | Path, text: str) -> Tokens:
    """The tokens with which a model reads a text: its own prefix (BOS), then the text's.

    Raises:
        BadInput: no text, or more tokens than the model has positions.
    """
    path = resolve_folder(folder)
    tokenizer = load_tokenizer(str(path))
    prefix = prefix_ids(tokenizer)
    body = tokenize(tokenizer, text)
    if not body.ids:
        raise BadInput("nothing to capture", found="an empty text", expected="at least one token")
    limit = Geometry.from_folder(path).max_positions
    ids = prefix + body.ids
    if len(ids) > limit:
        raise BadInput(
            f"the text does not fit into {path.name}",
            found=f"{len(ids)} tokens",
            expected=f"at most {limit}",
            remedy="split the text into several memories",
        )
    spans = np.concatenate((np.zeros((len(prefix), 2), np.int64), body.spans))
    return Tokens(ids, spans)


@torch.no_grad()
def states(model: PreTrainedModel, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers as cached, [T, H, D] each.

    A plain `DynamicCache()`: transformers' default keeps only the window of sliding layers.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    model.base_model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cached(cache, repeats(model.config))


def cached(cache: DynamicCache, every: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers of a cache after a prefill, [T, H, D] each; of heads that the
    model repeats `every` so often, one."""
    # Declared as layers that may hold nothing; after a prefill each of them holds its states.
    layers: list[Any] = cache.layers
    keys = [layer.keys[0, ::every].transpose(0, 1) for layer in layers]
    values = [layer.values[0, ::every].transpose(0, 1) for layer in layers]
    return keys, values


def repeats(config: Any) -> int:
    """How many times transformers caches each KV head: Falcon's new architecture, once for each
    head that reads it; the engines, and all other models, once."""
    if not getattr(config, "new_decoder_architecture", False):
        return 1
    return config.num_attention_heads // config.num_kv_heads


def capture(
    folder: str | Path, text: str, *, name: str | None = None, model: PreTrainedModel | None = None
) -> Package:
    """Capture a text with transformers: computed in float32, stored in the model's dtype."""
    tokens = read_tokens(folder, text)
    geometry = Geometry.from_folder(folder, len(tokens.ids))
    keys, values = states(model or load_model(folder), tokens.ids)
    dtype = getattr(torch, geometry.dtype)
    return build(
        geometry=geometry,
        text=text,
        tokens=tokens.ids,
        spans=tokens.spans,
        keys=[key.to(dtype) for key in keys],
        values=[value.to(dtype) for value in values],
        engine="transformers",
        versions=versions(),
        name=name,
    )
