"""Calibration examples: features of contexts, and native predictions of their continuations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.memories import Reread, narrowed, ragged_rows
from awareness_vllm.fit.reader import Reader, at
from awareness_vllm.fit.texts import Lesson
from awareness_vllm.fit.tokens import Indices, TextTokens, Tokeniser, Workers, pieces
from awareness_vllm.models.hf import cache_repeats, new_cache, pad_right, padded_cache_states
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import DynamicCache

LIKELY = 256
"""Tokens of each native prediction that the KL divergence is taken over on a CPU: the head over a
vocabulary of 262k would cost more than the rest of a step. A GPU takes all of them."""
BUCKET = 16
"""Steps on a GPU whose lessons are sorted by length, so that little is padded."""


@dataclass(frozen=True)
class LessonTokens:
    """A lesson's tokens: the `context`, the target's ids of the `continuation`, and the `reread`
    [N] ones among the context's ids."""

    context: TextTokens
    continuation: list[int]
    reread: Indices


Lessons = Callable[[int], Lesson]
"""The lesson of each number."""


@dataclass(frozen=True)
class PairLessons:
    """The lessons of pairs of context and continuation, again and again."""

    pairs: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __call__(self, number: int) -> Lesson:
        return Lesson(*self.pairs[number % len(self.pairs)])


def tokenise(state: tuple[Tokeniser, Lessons], numbers: Sequence[int]) -> list[LessonTokens]:
    """The tokens of the lessons of some numbers."""
    tokeniser, lessons = state
    return [lesson_tokens(tokeniser, lessons(number)) for number in numbers]


def lesson_tokens(tokeniser: Tokeniser, lesson: Lesson) -> LessonTokens:
    """A lesson's tokens; of a map that reads no tokens, none is re-read: its rows have no place."""
    context = tokeniser.text(lesson.context)
    native = np.zeros(len(context.ids), bool)
    if tokeniser.predecessors is not None:
        for begin, end in lesson.reread:
            first, last = (len(lesson.context[:at].encode()) for at in (begin, end))
            native |= (context.spans[:, 0] < last) & (context.spans[:, 1] > first)
    return LessonTokens(context, tokeniser.continuation(lesson.continuation), native.nonzero()[0])


@dataclass(frozen=True)
class Batch:
    """B lessons as one step reads them.

    `features` [M, F] bfloat16, standardised, of all contexts' rows one after the other, `lengths`
    of each; `ids` of each continuation; the `native` logits [sum of their counts, V] of the
    `tokens` [V], of all where None; `taken` [sum of their counts, V] bool, the tokens that each
    lesson is judged by, all where None; and the rows that are `reread`.
    """

    features: Tensor
    lengths: list[int]
    ids: list[list[int]]
    native: Tensor
    tokens: Tensor | None = None
    taken: Tensor | None = None
    reread: Reread | None = None

    def as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the note that `restored` takes."""
        tensors = {"features": self.features, "native": self.native}
        tensors |= {n: t for n in ("tokens", "taken") if (t := getattr(self, n)) is not None}
        if self.reread is not None:
            tensors["reread"] = self.reread.rows
            for side, states in zip(("key", "value"), self.reread.states, strict=True):
                tensors |= {f"{side}.{i}": state for i, state in enumerate(states)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return tensors, {"lengths": self.lengths, "ids": self.ids}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], note: dict[str, Any]) -> Batch:
        """The batch of what was saved."""
        reread = None
        if (rows := tensors.pop("reread", None)) is not None:
            layers = range(sum(name.startswith("key.") for name in tensors))
            keys, values = ([tensors.pop(f"{s}.{i}") for i in layers] for s in ("key", "value"))
            reread = Reread(rows, (keys, values))
        lengths, ids = note["lengths"], note["ids"]
        return cls(lengths=lengths, ids=ids, reread=reread, **tensors)  # type: ignore[arg-type]


class CalibrationExamples:
    """The batches of lessons, computed at first use; with a checkpoint also saved to disk.

    Args:
        lessons: the lesson of each number.
        total: how many there are; None for any number of them.
        size: B, the lessons of a batch.
        workers: of the reader's tokeniser and the lessons, to tokenise ahead; by default none.
        whole: whether all tokens of the native predictions count, as they do on a GPU.
    """

    def __init__(
        self,
        reader: Reader,
        wmatrix: WMatrix,
        lessons: Lessons,
        total: int | None,
        size: int,
        *,
        workers: Workers | None = None,
        checkpoint: Checkpoint | None = None,
        name: str = "example",
        whole: bool = False,
    ) -> None:
        self.reader, self.size, self.total = reader, size, total
        self.wmatrix = wmatrix.to(reader.device)
        self.checkpoint, self.name = checkpoint, name
        self.on_gpu = torch.device(reader.device).type != "cpu"
        self.whole = whole or self.on_gpu
        self.workers = workers or Workers(0, (reader.tokeniser, lessons))

    def __len__(self) -> int:
        """The batches of an epoch; 0 where there is no end of them."""
        return 0 if self.total is None else -(-self.total // self.size)

    def numbers(self, epoch: int, seed: int) -> Iterable[int]:
        """The order of the batches in an epoch; in the first one unshuffled."""
        if self.total is None:
            return count()
        if epoch == 0:
            return range(len(self))
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(len(self), generator=generator).tolist()

    def batches(self, numbers: Iterable[int]) -> Iterator[Batch]:
        """The batches of some numbers. On a GPU the lessons of `BUCKET` batches are sorted by
        length and dealt anew, so that little is padded."""
        if self.checkpoint is not None:
            yield from map(self.saved, numbers)
            return
        tokenised = self.workers.map(tokenise, map(self.lesson_numbers, numbers))
        for bucket in pieces(tokenised, BUCKET if self.on_gpu else 1):
            lessons = [lesson for batch in bucket for lesson in batch]
            if self.on_gpu:
                lessons.sort(key=lambda lesson: len(lesson.context))
            dealt = list(pieces(lessons, self.size))
            random.Random(len(lessons[0].context)).shuffle(dealt)
            yield from map(self.read, dealt)

    def lesson_numbers(self, number: int) -> list[int]:
        """The numbers of a batch's lessons."""
        end = (number + 1) * self.size
        return list(range(number * self.size, end if self.total is None else min(end, self.total)))

    def saved(self, number: int) -> Batch:
        """A batch from the checkpoint; made and saved where it is not there."""
        assert self.checkpoint is not None
        name = f"{self.name}-{number:05}"
        if (found := self.checkpoint.load(name)) is not None:
            return Batch.restored(*found)
        (lessons,) = self.workers.map(tokenise, [self.lesson_numbers(number)])
        batch = self.read(lessons)
        self.checkpoint.save(name, *batch.as_saved())
        return batch

    @torch.no_grad()
    def read(self, lessons: Sequence[LessonTokens]) -> Batch:
        """The batch of some lessons, read by both models."""
        reader, texts = self.reader, [lesson.context for lesson in lessons]
        features, masked = reader.features(texts)
        features = ((features - self.wmatrix.mean) * self.wmatrix.scale).bfloat16()
        features[:, : reader.width].masked_fill_(masked[:, None], 0)
        ids = [lesson.continuation for lesson in lessons]
        counts, begins = [len(own) for own in ids], [len(text.ids) for text in texts]
        model, cache = reader.target_model, new_cache()
        whole = [[*text.ids, *own] for text, own in zip(texts, ids, strict=True)]
        padded = pad_right(whole, model.device)
        rows = ragged_rows(counts, padded.shape[1], begins).to(model.device)
        with narrowed(model, None, rows):
            native = model(padded, past_key_values=cache, use_cache=True).logits[0]
        tokens = taken = None
        if not self.whole:
            tokens, taken = likely_tokens(native, counts)
            native = native[:, tokens]
        return Batch(
            features, [len(text) for text in texts], ids, native, tokens, taken,
            reread_rows(reader, lessons, cache),
        )  # fmt: skip


def likely_tokens(native: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The tokens [N] among the `LIKELY` ones at any position of any lesson, of logits [M, V]; and
    which of them are so for each position's own lesson, [M, N] bool, None for a single lesson."""
    likely = native.topk(min(LIKELY, native.shape[1]), dim=-1).indices
    own = [part.unique() for part in likely.split(list(counts))]
    if len(own) == 1:
        return own[0], None
    tokens = torch.cat(own).unique()
    taken = [torch.isin(tokens, part).expand(n, -1) for part, n in zip(own, counts, strict=True)]
    return tokens, torch.cat(taken)


def reread_rows(
    reader: Reader, lessons: Sequence[LessonTokens], cache: DynamicCache
) -> Reread | None:
    """The rows that lessons have re-read, of a cache of their whole texts.

    Read after the text itself, not after aligned rows as `align.reread` does: that would be a pass
    of its own for each passage.
    """
    if not any(len(lesson.reread) for lesson in lessons):
        return None
    positions = torch.from_numpy(np.concatenate([lesson.reread for lesson in lessons]))
    counts = [len(lesson.reread) for lesson in lessons]
    begins = np.cumsum([0, *(len(lesson.context) for lesson in lessons[:-1])])
    first = torch.from_numpy(begins).repeat_interleave(torch.tensor(counts))
    states = padded_cache_states(cache, cache_repeats(reader.target_model.config))
    where = at(positions, counts, states[0][0].shape[1]).to(reader.device)
    keys, values = ([state.flatten(0, 1)[where] for state in part] for part in states)
    return Reread((first + positions - len(reader.sink)).to(reader.device), (keys, values))
