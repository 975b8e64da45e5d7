"""The five-arm protocol: retention on held-out texts, fact recall on cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.bootstrap import retention, share
from awareness_vllm.evaluate.conditions import CONDITIONS, EvalHarness, kl_divergence, token_nll
from awareness_vllm.models.tokens import load_tokenizer, tokenize

Item = TypeVar("Item")
Rows = np.ndarray | slice
ALL = slice(None)
Excerpt = tuple[str, str, list[int]]
"""A text's name, its context, and the ids after it: the first one is read, the rest is scored."""
CHARACTERS_PER_TOKEN = 6
"""An upper bound for English, by which enough text is joined for a context."""


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

    def summary(self) -> dict[str, Any]:
        """Means of each condition, and retentions with their intervals."""
        tails = [name for name in self.conditions if name not in CONDITIONS]
        return {
            "conditions": means(self.conditions, ("nll", "kl", "top1")),
            "retention": self.retention(),
            "tails": {name: self.retention(name) for name in tails},
            "n": len(self.names),
        }


def evaluate_texts(
    harness: EvalHarness,
    documents: Sequence[Document],
    *,
    context: int = 300,
    continuation: int = 60,
    limit: int | None = None,
    tails: Sequence[int] = (),
    progress: bool = True,
) -> TextFigures:
    """Figures of the target's predictions of `continuation` tokens after `context` of memory.

    Args:
        tails: lengths of native tails, a further condition for each.

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
    for i, wrong in tqdm(pair_indices(len(excerpts)), desc="five arms", disable=not progress):
        name, text, ids = excerpts[i]
        names.append(name)
        wrong_memory = harness.package(excerpts[wrong][1])
        conditions = harness.conditions(
            harness.package(text), wrong_memory, ids, continuation, tails
        )
        native = conditions["native"]
        for condition, logprobs in conditions.items():
            rows.setdefault(condition, []).append(text_metrics(native, logprobs, ids))
    return TextFigures(names, {condition: np.array(figures) for condition, figures in rows.items()})


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

    def summary(self) -> dict[str, Any]:
        """Means of each condition, and recalls with their intervals."""
        tails = [name for name in self.conditions if name not in CONDITIONS]
        return {
            "conditions": means(self.conditions, ("exact_match", "logprob")),
            "tails": {name: self.recall(name) for name in tails},
            "n": len(self.kinds),
        }


def evaluate_cases(
    harness: EvalHarness,
    cases: Sequence[dict[str, str]],
    *,
    limit: int | None = None,
    tails: Sequence[int] = (),
    progress: bool = True,
) -> CaseFigures:
    """Fact recall: whether the greedy answer is exact, and the answer's log probability.

    Raises:
        BadInput: fewer than two cases.
    """
    cases = sample_evenly(cases, limit)
    if len(cases) < 2:
        raise BadInput("too few cases", found=len(cases), expected="at least 2")
    tokenizer = load_tokenizer(str(harness.target))
    rows: dict[str, list[tuple[float, float]]] = {}
    distances = [distance(tokenizer, case["context"], case["answer"]) for case in cases]
    for i, case in enumerate(tqdm(cases, desc="five arms", disable=not progress)):
        tokens = tokenize(tokenizer, case["question"] + case["answer"])
        boundary = len(case["question"].encode())
        scored = int((tokens.spans[:, 1] > boundary).sum())
        other = next(
            c for c in (*cases[i - 1 :: -1], *cases[::-1]) if c["context"] != case["context"]
        )
        wrong = harness.package(other["context"])
        conditions = harness.conditions(
            harness.package(case["context"]), wrong, tokens.ids, scored, tails
        )
        labels = torch.tensor(tokens.ids[-scored:])
        for condition, logprobs in conditions.items():
            exact = bool((logprobs.argmax(-1) == labels).all())
            rows.setdefault(condition, []).append(
                (float(exact), logprobs.gather(1, labels[:, None]).sum().item())
            )
    return CaseFigures(
        {condition: np.array(figures) for condition, figures in rows.items()},
        [case.get("kind", "fact") for case in cases],
        distances,
    )


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


def sample_evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
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
