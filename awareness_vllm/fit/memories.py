"""Mapped memories of unequal lengths as one cache of the target, and its logits after them.

Memories stand at the right end of the cache, so that what follows begins in one column: left of a
shorter one are zeros, which the attention mask hides. Windows count columns, and so stay right;
positions are each memory's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awareness_vllm.fit.reader import Reader, at
from awareness_vllm.models.hf import new_cache, pad_right
from awareness_vllm.models.rope import Rotations
from awareness_vllm.wmatrix.features import split_states

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

States = tuple[list[Tensor], list[Tensor]]
"""Keys and values, per layer."""


@dataclass(frozen=True)
class Reread:
    """Rows that the target read itself: `rows` [N] of the batch's memories, one after the other,
    and their `states` per layer [N, H, D] as cached."""

    rows: Tensor
    states: States


def logits_after(
    reader: Reader,
    sinks: States,
    flat: Tensor,
    lengths: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    reread: Reread | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The target's logits at the ids that follow each of B memories, [sum of their counts, V],
    differentiable in the memories.

    Args:
        sinks: keys and values of the sink, per layer [S, H, D] as cached.
        flat: [M, O], the memories' states after it, one memory after the other, keys position-free.
        lengths: B, each memory's rows.
        reread: rows that are replaced.
        tokens: the output tokens [V] of the logits; all by default.
    """
    model = reader.target_model
    cache, columns = build_cache(reader, sinks, flat, lengths, reread)
    begins = torch.tensor(lengths) + len(reader.sink)
    counts = [len(ids) for ids in continuations]
    ids = pad_right(continuations, model.device)
    inputs: dict[str, Any] = {
        "past_key_values": cache,
        "position_ids": (begins[:, None] + torch.arange(ids.shape[1])).to(model.device),
    }
    if min(lengths) < max(lengths):
        hidden = torch.arange(columns + ids.shape[1]) < columns - begins[:, None]
        inputs["attention_mask"] = (~hidden).long().to(model.device)
    with narrowed(model, tokens, ragged_rows(counts, ids.shape[1]).to(model.device)):
        return model(ids, **inputs).logits[0]


def build_cache(
    reader: Reader,
    sinks: States,
    flat: Tensor,
    lengths: Sequence[int],
    reread: Reread | None = None,
) -> tuple[DynamicCache, int]:
    """The target's cache of memories, differentiable in them, and its columns."""
    geometry, dtype, sink = reader.target_geometry, reader.target_model.dtype, len(reader.sink)
    count, columns = len(lengths), sink + max(lengths)
    rows = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
    slots = at(rows - ends + columns, lengths, columns).to(flat.device)
    first = at(
        torch.cat([torch.arange(sink) - sink - length + columns for length in lengths]),
        [sink] * count,
        columns,
    ).to(flat.device)
    rotations = Rotations(rows + sink, flat.device)
    free, values = split_states(geometry, flat)
    cache = new_cache()
    for i, layer in enumerate(geometry.layers):
        parts = []
        key = rotations.rotate(free[i], layer.positions)
        for side, (own, states) in enumerate(((sinks[0][i], key), (sinks[1][i], values[i]))):
            whole = torch.zeros(
                count * columns, layer.heads, layer.head_dim, dtype=dtype, device=flat.device
            )
            whole = whole.index_copy(0, first, own.to(dtype).repeat(count, 1, 1))
            whole = whole.index_copy(0, slots, states.to(dtype))
            if reread is not None:
                native = reread.states[side][i].to(dtype)
                whole = whole.index_copy(0, slots[reread.rows], native)
            parts.append(whole.unflatten(0, (count, columns)).transpose(1, 2))
        cache.update(parts[0], parts[1], i)
    return cache, columns


def ragged_rows(counts: Sequence[int], columns: int, begins: Sequence[int] = ()) -> Tensor:
    """The flat indices, in a batch [B, columns], of `counts` columns of each text from its `begins`
    on (0 by default), one text after the other."""
    starts = begins or [0] * len(counts)
    index = torch.cat([torch.arange(b, b + n) for b, n in zip(starts, counts, strict=True)])
    return at(index, counts, columns)


class _NarrowHead(torch.nn.Module):
    """A model's output head of some rows of its batch alone, and of some tokens."""

    def __init__(self, head: torch.nn.Module, tokens: Tensor | None, rows: Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.weight: Tensor = head.weight if tokens is None else head.weight[tokens]  # type: ignore[index, assignment]
        bias: Tensor | None = head.bias  # type: ignore[assignment]
        self.bias = bias if bias is None or tokens is None else bias[tokens]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [1, rows, tokens] of hidden states [B, N, E]; [B, N, tokens] without rows."""
        if self.rows is not None:
            hidden = hidden.flatten(0, 1)[self.rows][None]
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


@contextlib.contextmanager
def narrowed(
    model: PreTrainedModel, tokens: Tensor | None, rows: Tensor | None = None
) -> Iterator[None]:
    """A context in which the model's head has only these output tokens [V], all without, and gives
    the logits of these rows [N] of a batch alone, as [1, N, V]."""
    head = model.get_output_embeddings()
    model.set_output_embeddings(_NarrowHead(head, tokens, rows))
    try:
        yield
    finally:
        model.set_output_embeddings(head)
