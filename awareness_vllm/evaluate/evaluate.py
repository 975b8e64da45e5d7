"""The five-arm protocol: retention on held-out texts, fact recall on cases."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.arms import MAP_ALONE, Item, PlanShape, arms_of, score
from awareness_vllm.evaluate.bootstrap import margin, retention, share
from awareness_vllm.evaluate.conditions import CONDITIONS, EvalHarness, kl_divergence, token_nll
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package

Rows = np.ndarray | slice
ALL = slice(None)
Excerpt = tuple[str, str, list[int]]
"""A text's name, its context, and the ids after it: the first one is read, the rest is scored."""
CHARACTERS_PER_TOKEN = 6
"""An upper bound for English, by which enough text is joined for a context."""
CHUNK_TOKENS = {"cpu": 0, "cuda": 32768}
"""Tokens of contexts that are read together, by device; at least two contexts are."""
LEAST = 6
"""Texts, or cases, that are measured whatever the time."""
QUESTION_WORDS = 32
"""The last words of a context by which passages are chosen where its continuation is scored."""
Case = dict[str, Any]
Element = TypeVar("Element")


@dataclass
class TextFigures:
    """Figures of n texts: `conditions` are [n, 3] (NLL, KL from native, top-1 agreement with
    native), by condition."""

    names: list[str]
    conditions: dict[str, np.ndarray]

    def nll(self, condition: str) -> np.ndarray:
        """The texts' NLL in nats per token, [n]."""
        return self.conditions[condition][:, 0]

    def retention(self, condition: str = "memory", rows: Rows = ALL) -> dict[str, float]:
        """A condition's retention over all texts, or over some `rows` of them."""
        return retention(*(self.nll(name)[rows] for name in ("native", condition, "none")))

    def margin(self, condition: str, controls: Sequence[str]) -> dict[str, float]:
        """A condition's retention less that of the best of some others."""
        native, memory, none = (self.nll(name) for name in ("native", condition, "none"))
        gains = [none - self.nll(name) for name in controls]
        return margin(none - memory, gains, none - native)

    def summary(self) -> dict[str, Any]:
        """Means of each condition, and retentions with their intervals."""
        plans = [name for name in self.conditions if name not in CONDITIONS]
        return {
            "conditions": means(self.conditions, ("nll", "kl", "top1")),
            "retention": self.retention(),
            "plans": {name: self.retention(name) for name in plans},
            "n": len(self.names),
        }


def evaluate_texts(
    harness: EvalHarness,
    documents: Sequence[Document],
    *,
    context: int = 300,
    continuation: int = 60,
    limit: int | None = None,
    shapes: Sequence[PlanShape] = (MAP_ALONE,),
    controls: Sequence[str] = (),
    progress: bool = True,
    until: float | None = None,
) -> TextFigures:
    """Figures of the target's predictions of `continuation` tokens after `context` of memory.

    The question by which passages are chosen are the context's last words, as many as a prompt
    repeats: the same for re-reading and for its controls.

    Args:
        shapes: plans, a further condition of *memory* and *tokens_only* for each.
        controls: of CONTROLS, at the operations of each plan.
        until: the time, by `time.monotonic`, after which no text but the LEAST is begun.

    Raises:
        BadInput: fewer than two texts are long enough (the wrong memory is another text's).
    """
    excerpts = take_excerpts(harness, documents, context, continuation, limit)
    if len(excerpts) < 2:
        raise BadInput(
            "too few texts to evaluate on",
            found=f"{len(excerpts)} of {len(documents)} texts are long enough",
            expected=f"at least 2 of {context + continuation + 1} tokens or more",
            remedy="give more or longer texts, or a smaller --context",
        )
    names: list[str] = []
    rows: dict[str, list[tuple[float, float, float]]] = {}
    pairs = pair_indices(len(excerpts))
    for chunk in chunks(harness, pairs, context, progress=progress, until=until):
        packages = harness.packages([excerpts[i][1] for pair in chunk for i in pair])
        items = [
            Item(packages[text], ids, continuation, last_words(text), packages[excerpts[wrong][1]])
            for (_, text, ids), wrong in ((excerpts[i], wrong) for i, wrong in chunk)
        ]
        names += [excerpts[i][0] for i, _ in chunk]
        natives: dict[int, Tensor] = {}
        figures: list[dict[str, tuple[float, float, float]]] = [{} for _ in items]
        arms = arms_of(harness, items, shapes, controls)
        for i, condition, logprobs in score(harness, items, arms):
            native = natives.setdefault(i, logprobs)
            figures[i][condition] = text_metrics(native, logprobs, items[i].ids)
        for figure in figures:
            for condition, row in figure.items():
                rows.setdefault(condition, []).append(row)
    return TextFigures(names, {condition: np.array(figures) for condition, figures in rows.items()})


def chunks(
    harness: EvalHarness,
    items: Sequence[Element],
    tokens: int,
    *,
    progress: bool,
    until: float | None = None,
) -> Iterator[Sequence[Element]]:
    """Items whose contexts of `tokens` are read together, as many as the device has room for. Those
    that are there by a time, `until`, are from everywhere among them."""
    size = max(2, CHUNK_TOKENS[harness.device] // tokens)
    begins = list(range(0, len(items), size))
    if until is not None:
        random.Random(0).shuffle(begins)
    with tqdm(total=len(items), desc="five arms", disable=not progress) as bar:
        for number, begin in enumerate(begins):
            if until is not None and number * size >= LEAST and time.monotonic() >= until:
                break
            chunk = items[begin : begin + size]
            yield chunk
            bar.update(len(chunk))


def last_words(text: str, count: int = QUESTION_WORDS) -> str:
    """The last `count` words of a text, with what stands between them."""
    begins = [match.start() for match in re.finditer(r"\S+", text)]
    return text[begins[-count] :] if len(begins) > count else text


def text_metrics(
    native: Tensor, logprobs: Tensor, ids: Sequence[int]
) -> tuple[float, float, float]:
    """NLL, KL from native and top-1 agreement with native of one condition on a text.

    Args:
        native, logprobs: [T, V].
        ids: T + 1, of which the first is not scored.
    """
    top1 = (native.argmax(-1) == logprobs.argmax(-1)).float()
    nll, kl = token_nll(logprobs, ids), kl_divergence(native, logprobs)
    return nll.mean().item(), kl.mean().item(), top1.mean().item()


def take_excerpts(
    harness: EvalHarness,
    documents: Sequence[Document],
    context: int,
    continuation: int,
    limit: int | None,
) -> list[Excerpt]:
    """Excerpts of at most `limit` documents that are long enough, sampled evenly."""
    excerpts = [
        (document.name, *parts)
        for document in documents
        if (parts := split_context(harness, document.text, context, continuation))
    ]
    return sample_evenly(excerpts, limit)


@dataclass
class CaseFigures:
    """Figures of n cases: `conditions` are [n, 2] (exact match, log probability), by condition;
    `kinds` of the facts, `distances` in tokens from a fact's last mention to the context's end."""

    conditions: dict[str, np.ndarray]
    kinds: list[str]
    distances: list[int]

    def exact(self, condition: str) -> np.ndarray:
        """Whether each answer is an exact match, [n] of 0 and 1."""
        return self.conditions[condition][:, 0]

    def recall(self, condition: str = "memory", rows: Rows = ALL) -> dict[str, float]:
        """A condition's exact matches as a share of native's, over all cases or some `rows`."""
        return share(self.exact(condition)[rows], self.exact("native")[rows])

    def margin(self, condition: str, controls: Sequence[str]) -> dict[str, float]:
        """A condition's recall less that of the best of some others."""
        others = [self.exact(name) for name in controls]
        return margin(self.exact(condition), others, self.exact("native"))

    def summary(self) -> dict[str, Any]:
        """Means of each condition, and recalls with their intervals."""
        plans = [name for name in self.conditions if name not in CONDITIONS]
        return {
            "conditions": means(self.conditions, ("exact_match", "logprob")),
            "plans": {name: self.recall(name) for name in plans},
            "n": len(self.kinds),
        }


def evaluate_cases(
    harness: EvalHarness,
    cases: Sequence[Case],
    *,
    limit: int | None = None,
    shapes: Sequence[PlanShape] = (MAP_ALONE,),
    controls: Sequence[str] = (),
    progress: bool = True,
    until: float | None = None,
) -> CaseFigures:
    """Fact recall: whether the greedy answer is exact, and the answer's log probability.

    Args:
        shapes, controls, until: as for `evaluate_texts`; passages are chosen by a case's question.

    Raises:
        BadInput: fewer than two cases.
    """
    # By kind: else an even sample of cases whose kinds take turns may be of some kinds only.
    cases = sample_evenly(sorted(cases, key=lambda case: str(case.get("kind", ""))), limit)
    if len(cases) < 2:
        raise BadInput("too few cases", found=len(cases), expected="at least 2")
    tokenizer = load_tokenizer(str(harness.target))
    rows: list[dict[str, tuple[float, float]]] = [{} for _ in cases]
    distances = [distance(tokenizer, case["context"], case["answer"]) for case in cases]
    longest = max(len(case["context"]) for case in cases) // CHARACTERS_PER_TOKEN + 1
    for chunk in chunks(harness, range(len(cases)), longest, progress=progress, until=until):
        others = [other_case(cases, i) for i in chunk]
        packages = harness.packages([c["context"] for c in (*(cases[i] for i in chunk), *others)])
        items = [
            case_item(tokenizer, cases[i], packages[cases[i]["context"]], packages[o["context"]])
            for i, o in zip(chunk, others, strict=True)
        ]
        arms = arms_of(harness, items, shapes, controls)
        for k, condition, logprobs in score(harness, items, arms):
            labels = torch.tensor(items[k].ids[-items[k].scored :], device=logprobs.device)
            exact = bool((logprobs.argmax(-1) == labels).all())
            likelihood = logprobs.gather(1, labels[:, None]).sum().item()
            rows[chunk[k]][condition] = float(exact), likelihood
    measured = [i for i, row in enumerate(rows) if row]
    conditions = {name: np.array([rows[i][name] for i in measured]) for name in rows[measured[0]]}
    kinds = [cases[i].get("kind", "fact") for i in measured]
    return CaseFigures(conditions, kinds, [distances[i] for i in measured])


def other_case(cases: Sequence[Case], i: int) -> Case:
    """The case before one that has another context: its wrong memory.

    Raises:
        BadInput: all have one context.
    """
    others = (c for c in (*cases[:i][::-1], *cases[::-1]) if c["context"] != cases[i]["context"])
    if (other := next(others, None)) is None:
        raise BadInput("all cases have one context", expected="at least two contexts")
    return other


def case_item(tokenizer: Tokenizer, case: Case, package: Package, other: Package) -> Item:
    """A case's question and answer, read after its memory; the answer is scored."""
    tokens = tokenize(tokenizer, case["question"] + case["answer"])
    boundary = len(case["question"].encode())
    scored = int((tokens.spans[:, 1] > boundary).sum())
    return Item(package, tokens.ids, scored, case["question"], other, asks=True)


def distance(tokenizer: Tokenizer, context: str, answer: str) -> int:
    """Tokens from the answer's last mention to the context's end; 0 without a mention."""
    _, mention, rest = context.rpartition(answer.strip())
    return len(tokenize(tokenizer, rest).ids) if mention and rest else 0


def means(conditions: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each condition's means over documents, by the figures' names."""
    order = sorted(conditions, key=lambda name: (*CONDITIONS, name).index(name))
    return {
        name: dict(zip(names, conditions[name].mean(0).tolist(), strict=True)) for name in order
    }


def pair_indices(count: int) -> list[tuple[int, int]]:
    """Each document's index with that of another, half of all away: neighbours may share facts.

    The two of a pair follow each other, so that each is captured once.
    """
    half = count // 2
    order = [j for i in range(half) for j in (i, i + half)] + list(range(2 * half, count))
    return [(i, (i + half) % (2 * half) if i < 2 * half else 0) for i in order]


def join_documents(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Documents, successive ones of a folder joined until they are long enough for so many tokens:
    few are as long as the longest contexts."""
    characters = CHARACTERS_PER_TOKEN * tokens
    texts: dict[str, list[Document]] = {}
    for document in documents:
        kind = texts.setdefault(document.name.split("/")[0], [])
        if kind and len(kind[-1].text) < characters:
            kind[-1] = Document(kind[-1].name, f"{kind[-1].text}\n\n{document.text}")
        else:
            kind.append(document)
    return [document for kind in texts.values() for document in kind]


def sample_evenly(items: Sequence[Element], limit: int | None) -> list[Element]:
    """At most `limit` items, evenly from all of them: the first ones may be all of one kind."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def split_context(
    harness: EvalHarness, text: str, context: int, continuation: int
) -> tuple[str, list[int]] | None:
    """A context of `context` target tokens, and the `continuation` + 1 ids that follow it; None
    where the text is too short."""
    tokens = tokenize(load_tokenizer(str(harness.target)), text)
    if len(tokens.ids) < context + continuation + 1:
        return None
    end = int(tokens.spans[context - 1, 1])
    head = text.encode()[:end].decode(errors="ignore")
    return head, tokens.ids[context : context + continuation + 1]
