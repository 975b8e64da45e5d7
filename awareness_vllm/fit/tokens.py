"""Texts as both models of a fit read them, made in this process or by others beside it.

Tokenising takes a CPU as long as a GPU takes to read, so there it is done ahead, by processes that
hold no model. What they hand over are numbers alone.
"""

from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from awareness_vllm.models.tokens import Spans, Tokens, align, load_tokenizer, tokenize
from awareness_vllm.packages.capture import read_tokens

Indices = npt.NDArray[np.int64]
Result = TypeVar("Result")
AHEAD = 4
"""Pieces of work for each process that wait or are done, so that none idles."""


@dataclass(frozen=True)
class TextTokens:
    """One text's tokens: `source`, ids as the source reads it; `ids`, the target's, its sink first;
    their byte `spans` [len(ids), 2], the sink's (0, 0).

    The map has a row for each of T tokens: `index` [T] is the source token that it reads,
    `positions` [T] its target token, counted after the sink.
    """

    text: str
    source: list[int]
    ids: list[int]
    spans: Spans
    index: Indices
    positions: Indices

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Tokeniser:
    """A tokeniser of texts for both models: folders of the `source` and the `target`, the target's
    `sink`; without `predecessors` rows are the source's tokens."""

    source: Path
    target: Path
    sink: tuple[int, ...]
    predecessors: int | None

    def text(self, text: str) -> TextTokens:
        """A text's tokens. Raises BadInput as `read_tokens`."""
        source = self.source_tokens(text)
        target = tokenize(load_tokenizer(str(self.target)), text)
        if self.predecessors is None:
            index = np.arange(1, len(source.ids))
            positions = align(target.spans, source.spans[1:])
        else:
            index = align(source.spans, target.spans)
            positions = np.arange(len(index))
        sink = np.zeros((len(self.sink), 2), np.int64)
        spans = np.concatenate((sink, target.spans))
        return TextTokens(text, source.ids, [*self.sink, *target.ids], spans, index, positions)

    def source_tokens(self, text: str) -> Tokens:
        """A text's tokens as the source reads it."""
        return read_tokens(self.source, text)

    def continuation(self, text: str) -> list[int]:
        """The target's ids of a text that follows another."""
        return tokenize(load_tokenizer(str(self.target)), text).ids


class Workers:
    """Processes that do pieces of work beside the fit; without any, this one does them.

    Args:
        count: processes; 0 for none. They start at once, beside whatever comes first.
        state: what every function is given first, sent to each process once.
    """

    def __init__(self, count: int, state: Any) -> None:
        self.state, self.count = state, count
        self.pool: ProcessPoolExecutor | None = None
        if count:
            # Not forked: CUDA and torch's threads do not survive that.
            context = multiprocessing.get_context("spawn")
            # Through a queue: a spawned process takes its arguments in before the next one starts,
            # and some imports after it began.
            states = context.Queue()
            self.pool = ProcessPoolExecutor(count, context, _remember, (states,))
            for _ in range(count):
                states.put(state)
                self.pool.submit(int)

    def map(
        self, function: Callable[[Any, Any], Result], arguments: Iterable[Any]
    ) -> Iterator[Result]:
        """`function(state, argument)` of each argument, in their order, some ahead."""
        if self.pool is None:
            yield from (function(self.state, argument) for argument in arguments)
            return
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for argument in arguments:
                waiting.append(self.pool.submit(_call, function, argument))
                if len(waiting) > AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what waits is dropped."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


_state: list[Any] = []


def _remember(states: Queue[Any]) -> None:
    _state[:] = [states.get()]


def _call(function: Callable[[Any, Any], Result], argument: Any) -> Result:
    return function(_state[0], argument)


def pieces(items: Iterable[Result], size: int) -> Iterator[list[Result]]:
    """Consecutive items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while piece := list(islice(iterator, size)):
        yield piece


def by_length(texts: Sequence[TextTokens], budget: int) -> list[list[TextTokens]]:
    """Texts in batches of at most `budget` padded tokens (of one text where it is longer), each of
    similar lengths."""
    batches: list[list[TextTokens]] = []
    for text in sorted(texts, key=len):
        if not batches or (len(batches[-1]) + 1) * len(text) > budget:
            batches.append([])
        batches[-1].append(text)
    return batches
