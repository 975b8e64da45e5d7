"""Many texts read at once by one model, each after states of its own.

An evaluation reads the same few tokens after dozens of memories, and dozens of short texts. A
device has more to do in one forward pass than in many small ones, so they go through together,
padded: the states before them on the left, which keeps every distance, and the ids on the right,
where nothing that is read before can see them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.hf import cache_repeats
from awareness_vllm.wmatrix.features import joined, split_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = {"cpu": 8192, "cuda": 65536}
"""Rows of states, before and of the ids, in one forward pass at most, by the device's type: what a
cache in float32 and its copies take."""
PADDING = {"cpu": 128, "cuda": 4096}
"""Ids of padding in one forward pass that are cheaper than another pass."""
LOGITS = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Elements of logits in one forward pass at most."""


@dataclass(frozen=True)
class Text:
    """Ids to read after states: `before` are parts, [T, W] each, one after another."""

    before: tuple[Tensor, ...]
    ids: Sequence[int]

    @property
    def begin(self) -> int:
        """The position of the first id."""
        return sum(map(len, self.before))


@dataclass(frozen=True)
class Reader:
    """A model that reads many texts at once. States are `joined`: [T, W], all layers' keys, then
    values, as cached."""

    model: PreTrainedModel
    geometry: Geometry

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def states(self, texts: Sequence[Text]) -> list[Tensor]:
        """The model's own states of each text's ids, [ids, W]."""
        states: list[Tensor] = [torch.empty(0)] * len(texts)
        for batch in self._batches(texts, [()] * len(texts)):
            cache = self._forward([texts[i] for i in batch])
            begin = max(texts[i].begin for i in batch)
            for row, i in enumerate(batch):
                states[i] = self._rows(cache, row, begin, len(texts[i].ids))
        return states

    @torch.inference_mode()
    def logprobs(
        self, texts: Sequence[Text], scored: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each text's index with the log probabilities [scored, V] float32 of the last `scored` of
        its ids, in any order."""
        vocabulary = self.model.config.get_text_config().vocab_size
        most = max(1, LOGITS[self.device.type] // (vocabulary * max(scored, default=1)))
        groups = [(len(text.ids), count) for text, count in zip(texts, scored, strict=True)]
        for batch in self._batches(texts, groups, most):
            count, last = groups[batch[0]]
            # Indices, not a slice: of that torch makes a batched product, which copies the head.
            keep = torch.arange(count - last - 1, count - 1, device=self.device)
            logits = self._forward([texts[i] for i in batch], keep)
            for row, i in enumerate(batch):
                yield i, logits[row].float().log_softmax(-1)

    def _batches(
        self, texts: Sequence[Text], groups: Sequence[tuple[int, ...]], most: int = 1 << 30
    ) -> Iterator[list[int]]:
        """The indices of texts that are read together: of one group, and alike in length, so that
        little is padding."""
        order = sorted(
            range(len(texts)), key=lambda i: (groups[i], len(texts[i].ids), texts[i].begin)
        )
        batch: list[int] = []
        device = self.device.type
        for i in order:
            longer = [*batch, i]
            lengths = [len(texts[j].ids) for j in longer]
            rows = max(texts[j].begin for j in longer) + max(lengths)
            padding = len(longer) * max(lengths) - sum(lengths)
            full = len(longer) > most or len(longer) * rows > ROWS[device]
            full |= padding > PADDING[device] + sum(lengths) // 4
            if batch and (full or groups[i] != groups[batch[0]]):
                yield batch
                longer = [i]
            batch = longer
        if batch:
            yield batch

    def _forward(self, texts: Sequence[Text], keep: Tensor | None = None) -> Any:
        """The cache after reading the texts, or the logits [B, keep, V] at the ids `keep`."""
        from transformers import DynamicCache

        device = self.device
        most, longest = max(text.begin for text in texts), max(len(text.ids) for text in texts)
        ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in texts])
        begins = torch.tensor([text.begin for text in texts])
        cache, repeats = DynamicCache(), cache_repeats(self.model.config)
        if most:
            before = torch.zeros(len(texts), most, self.geometry.width, device=device)
            for row, text in zip(before, texts, strict=True):
                at = most - text.begin
                for part in text.before:
                    row[at : at + len(part)] = part
                    at += len(part)
            for i, layer in enumerate(zip(*split_states(self.geometry, before), strict=True)):
                key, value = (state.transpose(1, 2) for state in layer)
                if repeats > 1:
                    key, value = (s.repeat_interleave(repeats, 1) for s in (key, value))
                cache.update(key, value, i)
            del before
        inputs: dict[str, Any] = {
            "past_key_values": cache,
            "use_cache": True,
            "position_ids": (begins[:, None] + torch.arange(longest)).to(device),
        }
        if int(begins.min()) < most:
            places = torch.arange(most + longest)
            inputs["attention_mask"] = (places >= most - begins[:, None]).long().to(device)
        if keep is None:
            self.model.base_model(ids.to(device), **inputs)
            return cache
        return self.model(ids.to(device), logits_to_keep=keep, **inputs).logits

    def _rows(self, cache: Any, row: int, begin: int, count: int) -> Tensor:
        """The states [count, W] of one text from a cache of several."""
        repeats = cache_repeats(self.model.config)
        part = row, slice(None, None, repeats), slice(begin, begin + count)
        return joined(
            [layer.keys[part].transpose(0, 1) for layer in cache.layers],
            [layer.values[part].transpose(0, 1) for layer in cache.layers],
        )
