"""Floating point operations of a map and of native reading, per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def map_flop(wmatrix: WMatrix) -> int:
    """Operations of the map for one token: features to latent, latent to target states."""
    return 2 * (wmatrix.encode.numel() + wmatrix.decode.numel())


@torch.no_grad()
def prefill_flop(target: PreTrainedModel, tokens: int) -> float:
    """Operations of the target's prefill per token of a context, counted by torch.

    Without the head: only the last position needs it. Attention is counted as transformers
    computes it, over the whole context in every layer.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        target.base_model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return float(counter.get_total_flops()) / tokens


def share_of_prefill(mapped: float, native: float, tokens: int, tail: int) -> float:
    """The cost of a plan, the map for most tokens and native reading for the `tail`, as a share of
    native reading; `mapped` and `native` are operations per token."""
    return (mapped * (tokens - tail) + native * tail) / (native * tokens)
