"""Calibration examples: features of contexts, and native predictions of their continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.hf import last_logits
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.file import WMatrix

LIKELY = 256
"""Tokens of each native prediction that the KL divergence is taken over: the head over a
vocabulary of 262k would cost more than the rest of a step."""


@dataclass(frozen=True)
class CalibrationExample:
    """A memory and its continuation.

    `features` [T, F] bfloat16, standardised; `ids` [N] of the continuation; `likely` [K], the
    most likely tokens by the target at any of its positions, and their `native` logits [N, K].
    """

    features: Tensor
    ids: list[int]
    likely: Tensor
    native: Tensor


class CalibrationExamples:
    """The examples of pairs of context and continuation, computed at first use and saved to
    disk."""

    def __init__(
        self,
        reader: Reader,
        wmatrix: WMatrix,
        pairs: Sequence[tuple[str, str]],
        checkpoint: Checkpoint,
        name: str,
    ) -> None:
        self.reader, self.wmatrix, self.pairs = reader, wmatrix, pairs
        self.checkpoint, self.name = checkpoint, name

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> CalibrationExample:
        name = f"{self.name}-{index:05}"
        if (saved := self.checkpoint.load(name)) is None:
            example = self.read(*self.pairs[index])
            tensors = {
                "features": example.features,
                "likely": example.likely,
                "native": example.native.contiguous(),
            }
            self.checkpoint.save(name, tensors, {"ids": example.ids})
            return example
        tensors, note = saved
        return CalibrationExample(ids=note["ids"], **tensors)

    @torch.no_grad()
    def read(self, context: str, continuation: str) -> CalibrationExample:
        """The example of a context and its continuation, read by both models."""
        reader = self.reader
        ids = tokenize(load_tokenizer(str(reader.target)), continuation).ids
        row = reader.read(context)
        native = last_logits(reader.target_model, [*row.ids, *ids], len(ids))
        likely = native.topk(min(LIKELY, native.shape[1]), dim=-1).indices.unique()
        features = ((row.features - self.wmatrix.mean) * self.wmatrix.scale).bfloat16()
        features[row.masked.nonzero()[:, 0], : reader.width] = 0
        return CalibrationExample(features, ids, likely, native[:, likely])
