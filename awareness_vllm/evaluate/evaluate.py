"""The five-arm protocol: what a transferred memory is worth, measured on held-out text."""

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
Cut = tuple[str, str, list[int]]
"""A text's name, its context, and the ids after it: the first is read, the others are scored."""
CHARACTERS_PER_TOKEN = 6
"""More than English has: so many characters are enough for a context."""


@dataclass
class TextFigures:
    """What was measured, text by text: `arms[arm]` is [n, 3] (NLL, KL to native, top-1 agreement),
    `names` are the texts'."""

    names: list[str]
    conditions: dict[str, np.ndarray]

    def nll(self, arm: str) -> np.ndarray:
        return self.conditions[arm][:, 0]

    def retention(self, arm: str = "memory", rows: np.ndarray | None = None) -> dict[str, float]:
        """An arm's retention over all documents, or over some `rows` of them."""
        chosen = slice(None) if rows is None else rows
        return retention(*(self.nll(name)[chosen] for name in ("native", arm, "none")))

    def summary(self) -> dict[str, Any]:
        """Means of each arm, and retention with its interval."""
        tails = [arm for arm in self.conditions if arm not in CONDITIONS]
        return {
            "conditions": means(self.conditions, ("nll", "kl", "top1")),
            "retention": self.retention(),
            "tails": {arm: self.retention(arm) for arm in tails},
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
    """Retention over texts: the target goes on with each text after `context` tokens of memory.

    Args:
        tails: how many last tokens of the memory to read natively, an arm for each.

    Raises:
        BadInput: fewer than two texts are long enough (the wrong-memory arm needs another).
    """
    cuts = cut_evenly(harness, documents, context, continuation, limit)
    if len(cuts) < 2:
        raise BadInput(
            "too few texts to evaluate on",
            found=f"{len(cuts)} of {len(documents)} texts are long enough",
            expected=f"at least 2 of {context + continuation + 1} tokens or more",
            remedy="give more or longer texts, or a smaller --context",
        )
    names: list[str] = []
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for i, wrong in tqdm(paired(len(cuts)), desc="five arms", disable=not progress):
        name, text, ids = cuts[i]
        names.append(name)
        wrong_memory = harness.package(cuts[wrong][1])
        conditions = harness.conditions(
            harness.package(text), wrong_memory, ids, continuation, tails
        )
        native = conditions["native"]
        for arm, logprobs in conditions.items():
            rows.setdefault(arm, []).append(measures(native, logprobs, ids))
    return TextFigures(names, {arm: np.array(figures) for arm, figures in rows.items()})


def measures(native: Tensor, logprobs: Tensor, ids: Sequence[int]) -> tuple[float, float, float]:
    """NLL, KL to native and top-1 agreement of one arm on a text.

    Args:
        native, logprobs: [T, V].
        ids: T + 1, the one to start from first.
    """
    top1 = (native.argmax(-1) == logprobs.argmax(-1)).float()
    nll, kl = token_nll(logprobs, ids), kl_divergence(native, logprobs)
    return nll.mean().item(), kl.mean().item(), top1.mean().item()


def cut_evenly(
    harness: EvalHarness,
    documents: Sequence[Document],
    context: int,
    continuation: int,
    limit: int | None,
) -> list[Cut]:
    """The cuts of at most `limit` documents that are long enough, spread evenly over them."""
    cuts = [
        (document.name, *cut)
        for document in documents
        if (cut := _cut(harness, document.text, context, continuation))
    ]
    return evenly(cuts, limit)


@dataclass
class CaseFigures:
    """What was measured, case by case: `arms[arm]` is [n, 2] (exact match, log probability),
    `kinds` are the kinds of the facts asked for, `distances` how many tokens before the context's
    end each was last stated."""

    conditions: dict[str, np.ndarray]
    kinds: list[str]
    distances: list[int]

    def exact(self, arm: str) -> np.ndarray:
        return self.conditions[arm][:, 0]

    def recall(self, arm: str = "memory", rows: np.ndarray | None = None) -> dict[str, float]:
        """An arm's exact match as a share of native, over all cases or over some `rows` of them."""
        chosen = slice(None) if rows is None else rows
        return share(self.exact(arm)[chosen], self.exact("native")[chosen])

    def summary(self) -> dict[str, Any]:
        """Means of each arm."""
        return {
            "conditions": means(self.conditions, ("exact_match", "logprob")),
            "tails": {arm: self.recall(arm) for arm in self.conditions if arm not in CONDITIONS},
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
    """Fact recall: the greedy answer, compared token by token, and its log probability."""
    cases = evenly(cases, limit)
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
        for arm, logprobs in conditions.items():
            exact = bool((logprobs.argmax(-1) == labels).all())
            rows.setdefault(arm, []).append(
                (float(exact), logprobs.gather(1, labels[:, None]).sum().item())
            )
    return CaseFigures(
        {arm: np.array(figures) for arm, figures in rows.items()},
        [case.get("kind", "fact") for case in cases],
        distances,
    )


def distance(tokenizer: Tokenizer, context: str, answer: str) -> int:
    """Tokens between the answer's last mention and the context's end; 0 where it has none."""
    _, mention, rest = context.rpartition(answer.strip())
    return len(tokenize(tokenizer, rest).ids) if mention and rest else 0


def means(conditions: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each arm's means over documents, under the figures' names."""
    return {
        arm: dict(zip(names, conditions[arm].mean(0).tolist(), strict=True))
        for arm in sorted(conditions, key=lambda arm: (*CONDITIONS, arm).index(arm))
    }


def paired(count: int) -> list[tuple[int, int]]:
    """Each document with another, half of all away: a neighbour may tell of the same things.

    The two of a pair follow each other, so that each is captured once.
    """
    half = count // 2
    order = [j for i in range(half) for j in (i, i + half)] + list(range(2 * half, count))
    return [(i, (i + half) % (2 * half) if i < 2 * half else 0) for i in order]


def joined(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Successive documents of one folder as one text, until it is long enough for so many tokens.

    Few documents are as long as the longest contexts; entries of one source are read in a row.
    """
    characters = CHARACTERS_PER_TOKEN * tokens
    texts: dict[str, list[Document]] = {}
    for document in documents:
        kind = texts.setdefault(document.name.split("/")[0], [])
        if kind and len(kind[-1].text) < characters:
            kind[-1] = Document(kind[-1].name, f"{kind[-1].text}\n\n{document.text}")
        else:
            kind.append(document)
    return [document for kind in texts.values() for document in kind]


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, spread over all of them: the first ones may be all of one kind."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _cut(
    harness: EvalHarness, text: str, context: int, continuation: int
) -> tuple[str, list[int]] | None:
    """A context of so many target tokens, and the ids that follow it (one to start from)."""
    tokens = tokenize(load_tokenizer(str(harness.target)), text)
    if len(tokens.ids) < context + continuation + 1:
        return None
    end = int(tokens.spans[context - 1, 1])
    head = text.encode()[:end].decode(errors="ignore")
    return head, tokens.ids[context : context + continuation + 1]
