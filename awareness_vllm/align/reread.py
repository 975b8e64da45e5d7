"""Re-reading: passages of an aligned memory read natively, in place, and laid over its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.models.hf import cache_repeats, cache_states, inputs_after
from awareness_vllm.passages.index import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def passage_rows(
    model: PreTrainedModel, memory: AlignedMemory, span: Span
) -> tuple[list[Tensor], list[Tensor]]:
    """A passage's own keys and values per layer, [end - begin, H, D] as cached at its positions:
    read by the model after the memory's rows before it."""
    begin, end = span
    keys, values = ([state[:begin] for state in part] for part in (memory.keys, memory.values))
    ids = memory.ids[begin:end]
    inputs = inputs_after(keys, values, ids, model.dtype)
    model.base_model(torch.tensor([ids], device=model.device), use_cache=True, **inputs)
    keys, values = cache_states(inputs["past_key_values"], cache_repeats(model.config))
    return [key[begin:] for key in keys], [value[begin:] for value in values]


def reread(model: PreTrainedModel, memory: AlignedMemory, spans: Sequence[Span]) -> AlignedMemory:
    """The memory with these passages read natively.

    Each is read after aligned rows alone, whatever else is re-read: so its rows are the same for
    every question that points at it, and can be kept. At the budgets of a question this loses
    nothing beside re-reading them in order (docs/fidelity-log.md).
    """
    if not spans:
        return memory
    keys, values = ([state.clone() for state in part] for part in (memory.keys, memory.values))
    for begin, end in spans:
        for whole, rows in zip(
            (keys, values), passage_rows(model, memory, (begin, end)), strict=True
        ):
            for state, row in zip(whole, rows, strict=True):
                state[begin:end] = row
    return AlignedMemory(memory.ids, keys, values)
