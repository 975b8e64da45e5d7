"""The five-arm protocol: what a transferred memory is worth, measured on held-out text.

Arms: *native* (the target reads the context), *memory* (aligned), *tokens_only* (the map with the
source's states blanked), *wrong_memory* (another document's), *none*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.aligner import AlignedMemory, copy, prompt_ids, realign
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.anchors.spans import load_tokenizer, tokenize
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.geometry import Geometry, resolve_folder
from awareness_vllm.packages.capture import capture, load_model, read_tokens, states
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.bootstrap import retention, share
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.reader import last_logits

Item = TypeVar("Item")
CHARACTERS_PER_TOKEN = 6
"""More than English has: so many characters are enough for a context."""
ARMS = ("native", "memory", "tokens_only", "wrong_memory", "none")


@dataclass
class Bench:
    """Both models and the map between them; without a map, source and target must be one model."""

    source: Path
    target: Path
    wmatrix: WMatrix | None

    def __post_init__(self) -> None:
        self.source, self.target = resolve_folder(self.source), resolve_folder(self.target)
        source, target = Geometry.from_folder(self.source), Geometry.from_folder(self.target)
        self.max_positions = target.max_positions
        self.dtype = getattr(torch, target.dtype)
        if self.wmatrix is None and not source.same_model(target):
            raise BadInput(
                f"{source.name} and {target.name} are different models",
                found="no W-Matrix",
                expected="the W-Matrix that leads from one to the other",
                remedy="give FILE.wmatrix, or fit one with `awareness fit`",
            )
        if self.wmatrix is not None:
            for role, model, wanted in (
                ("source", source, self.wmatrix.manifest.source),
                ("target", target, self.wmatrix.manifest.target),
            ):
                if not model.same_model(wanted):
                    raise UnsupportedModel(
                        f"the W-Matrix has another {role}",
                        found=f"{model.name} (weights {model.weights[:12]})",
                        expected=f"{wanted.name} (weights {wanted.weights[:12]})",
                        remedy=f"give the {role} model that the W-Matrix was fitted for",
                    )
        self.recent: dict[str, Package] = {}
        self.target_model = load_model(self.target)
        self.source_model = self.target_model if self.wmatrix is None else load_model(self.source)

    def package(self, text: str) -> Package:
        """The source's capture of a text; the last two are kept, one serves as a wrong memory."""
        if text not in self.recent:
            self.recent = dict([*self.recent.items()][-1:])
            self.recent[text] = capture(self.source, text, model=self.source_model)
        return self.recent[text]

    def memory(self, package: Package, *, blank: bool = False) -> AlignedMemory:
        if self.wmatrix is None:
            return copy(package)
        embed = self.target_model.get_input_embeddings()
        return realign(package, self.wmatrix, self.target, embed, dtype=self.dtype, blank=blank)

    def ids(self, text: str) -> list[int]:
        """The target's ids of a context: the sink (or its own prefix) and the text's tokens."""
        if self.wmatrix is not None:
            return prompt_ids(text, self.wmatrix.manifest.sink, self.target)
        return read_tokens(self.target, text).ids

    def sink(self) -> int:
        """How many first ids stand before any text."""
        return len(self.ids("x")) - len(tokenize(load_tokenizer(str(self.target)), "x").ids)

    @torch.inference_mode()
    def native(self, ids: list[int]) -> AlignedMemory:
        """The target's own states of these ids."""
        return AlignedMemory(ids, *states(self.target_model, ids))

    @torch.inference_mode()
    def logprobs(self, memory: AlignedMemory, ids: list[int], scored: int, tail: int = 0) -> Tensor:
        """Log probabilities of the last `scored` ids, read after a memory, [scored, V].

        The memory's last `tail` tokens are read natively after its others.
        """
        memory, recomputed = cut_tail(memory, tail)
        ids = [*recomputed, *ids]
        logits = last_logits(self.target_model, ids, scored + 1, **after(memory, ids))
        return logits[:-1].float().log_softmax(-1)

    def arms(
        self, context: str, other: Package, ids: list[int], scored: int, tails: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """Log probabilities of all five arms after one context, [scored, V] each; with each of the
        `tails` read natively, of the memory and of what its tokens alone give."""
        package = self.package(context)
        context_ids, sink = self.ids(context), self.sink()
        none = self.native(context_ids[:sink] or ids[:1])
        if not sink:
            # A target without a first token of its own starts with the prompt itself.
            none = AlignedMemory([], [k[:0] for k in none.keys], [v[:0] for v in none.values])
        memories = {
            "native": self.native(context_ids),
            "memory": self.memory(package),
            "wrong_memory": self.memory(other),
            "none": none,
        }
        if self.wmatrix is not None:
            memories["tokens_only"] = self.memory(package, blank=True)
        found = {arm: self.logprobs(memory, ids, scored) for arm, memory in memories.items()}
        for tail in tails:
            for arm in {"memory", "tokens_only"} & memories.keys():
                found[tail_arm(tail, arm)] = self.logprobs(memories[arm], ids, scored, tail)
        return found


@dataclass
class TextFigures:
    """What was measured, text by text: `arms[arm]` is [n, 3] (NLL, KL to native, top-1 agreement),
    `names` are the texts'."""

    names: list[str]
    arms: dict[str, np.ndarray]

    def nll(self, arm: str) -> np.ndarray:
        return self.arms[arm][:, 0]

    def retention(self, arm: str = "memory", rows: np.ndarray | None = None) -> dict[str, float]:
        """An arm's retention over all documents, or over some `rows` of them."""
        chosen = slice(None) if rows is None else rows
        return retention(*(self.nll(name)[chosen] for name in ("native", arm, "none")))

    def summary(self) -> dict[str, Any]:
        """Means of each arm, and retention with its interval."""
        tails = [arm for arm in self.arms if arm not in ARMS]
        return {
            "arms": means(self.arms, ("nll", "kl", "top1")),
            "retention": self.retention(),
            "tails": {arm: self.retention(arm) for arm in tails},
            "n": len(self.names),
        }


def evaluate_texts(
    bench: Bench,
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
    cuts = cut_evenly(bench, documents, context, continuation, limit)
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
        arms = bench.arms(text, bench.package(cuts[wrong][1]), ids, continuation, tails)
        native, labels = arms["native"], torch.tensor(ids[1:])
        for arm, logprobs in arms.items():
            surprise = -logprobs.gather(1, labels[:, None]).mean()
            kl = (native.exp() * (native - logprobs)).sum(-1).mean()
            top1 = (native.argmax(-1) == logprobs.argmax(-1)).float().mean()
            rows.setdefault(arm, []).append((surprise.item(), kl.item(), top1.item()))
    return TextFigures(names, {arm: np.array(figures) for arm, figures in rows.items()})


def cut_evenly(
    bench: Bench, documents: Sequence[Document], context: int, continuation: int, limit: int | None
) -> list[tuple[str, str, list[int]]]:
    """Name, context and the ids that follow it, of at most `limit` documents long enough."""
    cuts = [
        (document.name, *cut)
        for document in documents
        if (cut := _cut(bench, document.text, context, continuation))
    ]
    return evenly(cuts, limit)


@dataclass
class CaseFigures:
    """What was measured, case by case: `arms[arm]` is [n, 2] (exact match, log probability),
    `kinds` are the kinds of the facts asked for, `distances` how many tokens before the context's
    end each was last stated."""

    arms: dict[str, np.ndarray]
    kinds: list[str]
    distances: list[int]

    def exact(self, arm: str) -> np.ndarray:
        return self.arms[arm][:, 0]

    def recall(self, arm: str = "memory", rows: np.ndarray | None = None) -> dict[str, float]:
        """An arm's exact match as a share of native, over all cases or over some `rows` of them."""
        chosen = slice(None) if rows is None else rows
        return share(self.exact(arm)[chosen], self.exact("native")[chosen])

    def summary(self) -> dict[str, Any]:
        """Means of each arm."""
        return {
            "arms": means(self.arms, ("exact_match", "logprob")),
            "tails": {arm: self.recall(arm) for arm in self.arms if arm not in ARMS},
            "n": len(self.kinds),
        }


def evaluate_cases(
    bench: Bench,
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
    tokenizer = load_tokenizer(str(bench.target))
    rows: dict[str, list[tuple[float, float]]] = {}
    distances = [distance(tokenizer, case["context"], case["answer"]) for case in cases]
    for i, case in enumerate(tqdm(cases, desc="five arms", disable=not progress)):
        tokens = tokenize(tokenizer, case["question"] + case["answer"])
        boundary = len(case["question"].encode())
        scored = int((tokens.spans[:, 1] > boundary).sum())
        other = next(
            c for c in (*cases[i - 1 :: -1], *cases[::-1]) if c["context"] != case["context"]
        )
        wrong = bench.package(other["context"])
        arms = bench.arms(case["context"], wrong, tokens.ids, scored, tails)
        labels = torch.tensor(tokens.ids[-scored:])
        for arm, logprobs in arms.items():
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


def means(arms: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each arm's means over documents, under the figures' names."""
    return {
        arm: dict(zip(names, arms[arm].mean(0).tolist(), strict=True))
        for arm in sorted(arms, key=lambda arm: (*ARMS, arm).index(arm))
    }


def tail_arm(tail: int, arm: str = "memory") -> str:
    """The name of an arm whose last `tail` tokens are read natively."""
    return f"{arm}_tail_{tail}" if tail else arm


def cut_tail(memory: AlignedMemory, tail: int) -> tuple[AlignedMemory, list[int]]:
    """A memory without its last `tail` tokens, and their ids; the first token stays."""
    end = max(min(1, len(memory.ids)), len(memory.ids) - tail)
    keys, values = [k[:end] for k in memory.keys], [v[:end] for v in memory.values]
    return AlignedMemory(memory.ids[:end], keys, values), memory.ids[end:]


def after(memory: AlignedMemory, ids: Sequence[int]) -> dict[str, Any]:
    """The model's inputs that make it read ids after a memory: a float32 cache, positions."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (key, value) in enumerate(zip(memory.keys, memory.values, strict=True)):
        cache.update(key.float().transpose(0, 1)[None], value.float().transpose(0, 1)[None], i)
    begin = len(memory.ids)
    positions = torch.arange(begin, begin + len(ids))[None]
    return {"past_key_values": cache, "position_ids": positions}


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


def _cut(bench: Bench, text: str, context: int, continuation: int) -> tuple[str, list[int]] | None:
    """A context of so many target tokens, and the ids that follow it (one to start from)."""
    tokens = tokenize(load_tokenizer(str(bench.target)), text)
    if len(tokens.ids) < context + continuation + 1:
        return None
    end = int(tokens.spans[context - 1, 1])
    head = text.encode()[:end].decode(errors="ignore")
    return head, tokens.ids[context : context + continuation + 1]
