"""Floating point operations of a map and of native reading, and what they buy otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = (16, 48)
"""Lengths at which a target's operations are counted; they are a quadratic of the length."""


def map_flop(wmatrix: WMatrix) -> int:
    """Operations of the map for one token: features to latent, latent to target states."""
    return 2 * (wmatrix.encode.numel() + wmatrix.decode.numel())


@dataclass(frozen=True)
class Prefill:
    """A target's operations while it reads: `linear` for each token, and in each layer `attention`
    for each token that a token attends to: those before it, within the layer's window, and itself,
    which is what serving engines compute. Without the head: only the last position needs it."""

    linear: float
    attention: float
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, target: PreTrainedModel, geometry: Geometry) -> Prefill:
        """A target's operations, those of its matrices counted by torch."""
        config = target.config.get_text_config()
        head_dim = sum(layer.head_dim for layer in geometry.layers) / len(geometry.layers)
        # Queries by keys and weights by values; a product and its sum are two operations.
        attention = 4.0 * config.num_attention_heads * head_dim
        (a, first), (b, second) = ((n, _counted(target, n)) for n in PROBES)
        # Whether torch counts attention depends on its kernel; the quadratic part is taken off.
        linear = (first * b * b - second * a * a) / (a * b * (b - a))
        return cls(linear, attention, tuple(layer.window for layer in geometry.layers))

    def flop(self, begin: int, end: int) -> float:
        """Operations of reading positions begin … end - 1 after all those before them."""
        attended = sum(_attended(end, window) - _attended(begin, window) for window in self.windows)
        return self.linear * (end - begin) + self.attention * attended

    def affordable(self, flop: float, begin: int, most: int) -> int:
        """How many tokens from position `begin` on, at most `most`, so many operations read."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.flop(begin, begin + middle) <= flop:
                low = middle
            else:
                high = middle - 1
        return low


def plan_flop(
    mapped: float, prefill: Prefill, tokens: int, tail: int, reread: int, sink: int = 1
) -> float:
    """Operations of a plan for a memory of `tokens` after a sink: the map for all but the tail, and
    native reading of the tail, and of the re-read tokens as if all of them stood just before it.

    Args:
        mapped: operations of the map per token.
    """
    begin = sink + tokens - tail
    passages = prefill.flop(max(sink, begin - reread), begin)
    return mapped * (tokens - tail) + passages + prefill.flop(begin, sink + tokens)


def plan_cost(
    mapped: float, prefill: Prefill, tokens: int, tail: int = 0, reread: int = 0, sink: int = 1
) -> float:
    """`plan_flop` as a share of reading all of the memory natively."""
    native = prefill.flop(sink, sink + tokens)
    return plan_flop(mapped, prefill, tokens, tail, reread, sink) / native


def _attended(end: int, window: int | None) -> int:
    """The pairs of a token and one that it attends to, of positions 0 … end - 1."""
    full = min(end, window or end)
    return full * (full + 1) // 2 + (end - full) * full


@torch.no_grad()
def _counted(target: PreTrainedModel, tokens: int) -> float:
    """Operations of a prefill as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=target.device)
        target.base_model(ids, use_cache=False)
    return float(counter.get_total_flops())
