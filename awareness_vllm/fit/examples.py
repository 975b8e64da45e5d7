"""What calibration learns from: texts, read once by both models, and what the target said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.file import WMatrix

LIKELY = 256
"""Tokens of each native prediction that the divergence is taken over: the head over a vocabulary
of 262k would cost more than the rest of a step."""


@dataclass(frozen=True)
class CalibrationExample:
    """A memory and what follows it.

    `features` [T, F] bfloat16, standardised; `ids` [N], the continuation's; `likely` [K], the
    tokens that the target finds likely somewhere in it, and its `native` logits of them [N, K].
    """

    features: Tensor
    ids: list[int]
    likely: Tensor
    native: Tensor


class CalibrationExamples:
    """The lessons of pairs of context and continuation, read at first use and then kept on disk."""

    def __init__(
        self,
        reader: Reader,
        wmatrix: WMatrix,
        pairs: Sequence[tuple[str, str]],
        work: Checkpoint,
        name: str,
    ) -> None:
        self.reader, self.wmatrix, self.pairs = reader, wmatrix, pairs
        self.work, self.name = work, name

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> CalibrationExample:
        name = f"{self.name}-{index:05}"
        if (kept := self.work.load(name)) is None:
            lesson = self.read(*self.pairs[index])
            tensors = {
                "features": lesson.features,
                "likely": lesson.likely,
                "native": lesson.native.contiguous(),
            }
            self.work.save(name, tensors, {"ids": lesson.ids})
            return lesson
        tensors, note = kept
        return CalibrationExample(ids=note["ids"], **tensors)

    @torch.no_grad()
    def read(self, context: str, continuation: str) -> CalibrationExample:
        """Both models read the text."""
        reader = self.reader
        ids = tokenize(load_tokenizer(str(reader.target)), continuation).ids
        row = reader.read(context)
        native = reader.logits([*row.ids, *ids], len(ids))
        likely = native.topk(min(LIKELY, native.shape[1]), dim=-1).indices.unique()
        features = ((row.features - self.wmatrix.mean) * self.wmatrix.scale).bfloat16()
        features[row.masked.nonzero()[:, 0], : reader.width] = 0
        return CalibrationExample(features, ids, likely, native[:, likely])
