"""The figures of maps on held-out texts and on half of the needles (even ones): good for choosing.

Batches are read once for all maps, as a fit reads its lessons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.anchors.corpus import Document, load
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.evaluate import join_documents, sample_evenly
from awareness_vllm.fit.examples import Batch, CalibrationExamples, LessonTokens
from awareness_vllm.fit.examples import lesson_tokens as tokens_of_lesson
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.texts import Lesson
from awareness_vllm.fit.tokens import pieces
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.file import WMatrix

Mapped = Callable[[Batch], Tensor]
"""The logits after the mapped memories of a batch."""
CONTINUATION = 60
CHARACTERS = 5
"""Characters of a token, at most, by which long texts are found."""
TOKENS_AT_ONCE = 16_384
"""Context tokens of a batch of the evaluation."""


def excerpts(
    reader: Reader, documents: Sequence[Document], length: int, limit: int
) -> list[LessonTokens]:
    """At most `limit` contexts of `length` target tokens, and the tokens that follow each."""
    tokenizer, lessons = load_tokenizer(str(reader.target)), []
    long = [d for d in documents if len(d.text) > CHARACTERS * (length + CONTINUATION)]
    for document in sample_evenly(long, limit):
        tokens = tokenize(tokenizer, document.text)
        if len(tokens.ids) < length + CONTINUATION + 1:
            continue
        end = int(tokens.spans[length - 1, 1])
        context = reader.tokeniser.text(document.text.encode()[:end].decode(errors="ignore"))
        follow = tokens.ids[length : length + CONTINUATION + 1]
        lessons.append(LessonTokens(context, follow, np.empty(0, np.int64)))
    return lessons


def needles(path: Path, length: int) -> list[dict[str, Any]]:
    """The even cases of a length."""
    cases = [json.loads(line) for line in path.read_text().splitlines()][::2]
    return [case for case in cases if case["tokens"] == length]


def arms(
    reader: Reader, wmatrix: WMatrix, maps: Mapping[str, Mapped], batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """Logits after native reading, nothing, each map, and each with what is re-read."""
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    nothing = torch.zeros(0, reader.target_geometry.width, device=reader.device)
    yield "native", batch.native
    yield "none", logits_after(reader, sinks, nothing, [0] * len(batch.ids), batch.ids)
    for name, mapped in maps.items():
        yield name, mapped(replace(batch, reread=None))
        if batch.reread is not None:
            yield f"{name}, re-read", mapped(batch)


@torch.no_grad()
def evaluate(
    reader: Reader,
    wmatrix: WMatrix,
    held_out: Path,
    limits: Sequence[int],
    length: int,
    maps: Mapping[str, Mapped],
) -> dict[str, Any]:
    """Retention of texts, exact matches of needles and their log probabilities (`logp`), of each of
    some maps with one source, at a length of contexts."""
    examples = CalibrationExamples(reader, wmatrix, no_lesson, 0, 1, whole=True)
    wmatrix = examples.wmatrix
    size = max(1, TOKENS_AT_ONCE // length)
    folders = [held_out / name for name in ("crawl", "debian-history", "wordnet")]
    documents = load([folder for folder in folders if folder.is_dir()])
    if length > 500:
        documents = join_documents(documents, length + CONTINUATION)
    texts = excerpts(reader, documents, length, limits[0])
    nll: dict[str, list[float]] = {}
    for lessons in pieces(texts, size):
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, maps, batch):
            for own, ids in by_lesson(logits, batch.ids):
                nll.setdefault(name, []).append(-label_logp(own[:-1], ids[1:]).mean().item())
    found: dict[str, Any] = {}  # of texts, then of needles
    if len(texts) > 1:
        losses = {name: np.array(values) for name, values in nll.items()}
        found["retention"] = {
            name: retention(losses["native"], losses[name], losses["none"]) for name in maps
        }
    cases = sample_evenly(needles(held_out / "needles" / "cases.jsonl", length), limits[1])
    exact: dict[str, list[bool]] = {}
    logp: dict[str, list[float]] = {}
    for some in pieces(cases, size):
        lessons, counts = zip(*(case_tokens(reader, case) for case in some), strict=True)
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, maps, batch):
            for (own, ids), count in zip(by_lesson(logits, batch.ids), counts, strict=True):
                answer, labels = own[-count - 1 : -1], ids[-count:]
                exact.setdefault(name, []).append(answer.argmax(-1).tolist() == labels)
                logp.setdefault(name, []).append(label_logp(answer, labels).sum().item())
    kinds = np.array([case["kind"] for case in cases])
    found["facts"] = {name: float(np.mean(hits)) for name, hits in exact.items()}
    found["logp"] = {name: float(np.mean(values)) for name, values in logp.items()}
    found["kinds"] = {
        kind: {name: float(np.array(hits)[kinds == kind].mean()) for name, hits in exact.items()}
        for kind in dict.fromkeys(kinds.tolist())
    }
    return found


def label_logp(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """The log probabilities [N] of labels, of logits [N, V]."""
    own = torch.tensor(labels, device=logits.device)
    return -torch.nn.functional.cross_entropy(logits.float(), own, reduction="none")


def by_lesson(logits: Tensor, ids: list[list[int]]) -> list[tuple[Tensor, list[int]]]:
    return list(zip(logits.split([len(own) for own in ids]), ids, strict=True))


def case_tokens(reader: Reader, case: dict[str, Any]) -> tuple[LessonTokens, int]:
    """A case as a lesson, its sentences re-read; and the tokens of its answer."""
    tokens = tokenize(load_tokenizer(str(reader.target)), case["question"] + case["answer"])
    answer = int((tokens.spans[:, 1] > len(case["question"].encode())).sum())
    ranges = tuple((begin, end) for begin, end in case["sentences"])
    lesson = tokens_of_lesson(reader.tokeniser, Lesson(case["context"], "", ranges))
    return LessonTokens(lesson.context, tokens.ids, lesson.reread), answer


def no_lesson(number: int) -> Lesson:
    raise BadInput("an evaluation has no lessons", found=number)
