"""A transformers cache built from states, differentiable in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.rope import rotate

if TYPE_CHECKING:
    from transformers import DynamicCache

States = Sequence[Sequence[Tensor]]
"""Keys and values, each per layer [T, H, D]."""


def build_cache(target: Geometry, states: States, sinks: States) -> DynamicCache:
    """The target's cache of the sink's states, as cached, and of position-free `states` after them.

    Args:
        states, sinks: keys and values, per layer [T, H, D] and [S, H, D].

    Returns:
        a bfloat16 cache of S + T tokens.
    """
    from transformers import DynamicCache

    (keys, values), (sink_keys, sink_values) = states, sinks
    sink = len(sink_keys[0])
    positions = torch.arange(sink, sink + len(keys[0]))
    cache = DynamicCache()
    for i, layer in enumerate(target.layers):
        key = torch.cat((sink_keys[i].float(), rotate(keys[i], positions, layer.positions)))
        value = torch.cat((sink_values[i].float(), values[i].float()))
        key, value = (s.bfloat16().transpose(0, 1)[None] for s in (key, value))
        cache.update(key, value, i)
    return cache
