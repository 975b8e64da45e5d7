"""The states that stand before what is scored, in every arm of every plan and its controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from torch import Tensor

from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.flops import map_flop, plan_flop
from awareness_vllm.evaluate.reader import Text
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package
from awareness_vllm.passages.index import PassageIndex, Span
from awareness_vllm.passages.quotes import quote
from awareness_vllm.passages.vectors import word_vectors

Segments = tuple[Tensor, ...]
"""States [T, W], one part after another."""


@dataclass(frozen=True, order=True)
class PlanShape:
    """What of a memory is read natively: its last `tail` tokens, and in place up to `reread` tokens
    that the question points at."""

    tail: int = 0
    reread: int = 0

    def condition(self, arm: str = "memory") -> str:
        """The name of an arm of this plan among the conditions."""
        tail = f"_tail_{self.tail}" if self.tail else ""
        return f"{arm}{tail}" + (f"_reread_{self.reread}" if self.reread else "")


MAP_ALONE = PlanShape()


@dataclass(frozen=True)
class Item:
    """A memory and the ids that are read after it, the last `scored` of which are scored.
    `question` is the text by which passages are chosen, `other` the wrong memory. What `asks`
    something may have passages quoted before it, as a server does."""

    package: Package
    ids: list[int]
    scored: int
    question: str = ""
    other: Package | None = None
    asks: bool = False


@dataclass
class Memory:
    """One item's memory in the target: its ids, the index of its passages, and its states [T, W] by
    arm, "memory" and "tokens_only". Where something is asked, passages are quoted by the target's
    `tokenizer`."""

    ids: list[int]
    sink: int
    question: str
    index: PassageIndex | None
    bases: dict[str, Tensor]
    tokenizer: Tokenizer | None = None
    passages: dict[tuple[str, Span], Tensor] = field(default_factory=dict)
    choices: dict[int, tuple[Span, ...]] = field(default_factory=dict)

    def begin_of(self, tail: int) -> int:
        """The first position of a native tail; at least one token stays the memory's."""
        return max(min(1, len(self.ids)), len(self.ids) - tail)

    def chosen(self, budget: int) -> tuple[Span, ...]:
        """The passages that the question points at, within a budget of tokens."""
        if self.index is None or not budget:
            return ()
        if budget not in self.choices:
            self.choices[budget] = self.index.choose(self.question, budget)
        return self.choices[budget]

    def quotes(self, budget: int) -> list[int]:
        """The ids of the quotes that a question has within a budget of tokens."""
        if self.index is None or self.tokenizer is None:
            return []
        ranges = [self.index.characters(span) for span in self.chosen(budget)]
        text = quote([self.index.text[begin:end] for begin, end in ranges])
        return tokenize(self.tokenizer, text).ids if text else []

    def laid_over(self, base: str, shape: PlanShape) -> Segments:
        """The states of an arm before its tail, with the re-read passages laid over."""
        whole, end = self.bases[base], self.begin_of(shape.tail)
        parts, at = [], 0
        for span in self.chosen(shape.reread):
            begin, stop = span[0], min(span[1], end)
            if begin < stop:
                parts += [whole[at:begin], self.passages[base, span][: stop - begin]]
                at = stop
        return (*parts, whole[at:end])

    def control(self, name: str, budget: int, reread: int) -> list[int]:
        """The ids that a control reads after the sink, at most `budget`, in order. Where something
        is asked, passages by themselves are quoted as a server quotes them."""
        count = len(self.ids)
        if self.tokenizer is not None and name in ("quotes", "passages"):
            most = min(reread, budget) if name == "passages" else budget
            # What stands around the passages is bought, too.
            while len(ids := self.quotes(most)) > budget:
                most = max(0, most - (len(ids) - budget))
            return ids
        tail = range(count, count)
        spans: tuple[Span, ...] = ()
        if name == "passages":
            spans = self.chosen(min(reread, budget))
        elif name != "truncation":
            spans = self.chosen(budget // 2 if name == "half" else budget)
        read = {position for span in spans for position in range(*span)}
        if name in ("truncation", "half"):
            first = count
            while len(read) < budget and first > self.sink:
                first -= 1
                read.add(first)
            tail = range(first, count)
        return [self.ids[position] for position in sorted({*read, *tail})]


def arms_of(
    harness: EvalHarness,
    items: Sequence[Item],
    shapes: Sequence[PlanShape] = (MAP_ALONE,),
    controls: Sequence[str] = (),
) -> list[dict[str, Segments]]:
    """For each item the states before its ids, by condition, *native* first.

    The five arms, then *memory* and *tokens_only* by each of the `shapes`, and its `controls`; of
    what asks something also *quoted*, the memory with the passages quoted that a shape re-reads.
    Without `other` packages there is no *wrong_memory*, without a map neither *tokens_only* nor
    controls: a copy costs nothing.
    """
    memories = [_memory(harness, item) for item in items]
    _reread(harness, memories, shapes)
    arms: list[dict[str, Segments]] = [{} for _ in items]
    natives: list[tuple[int, str, list[int]]] = []
    for i, (item, memory) in enumerate(zip(items, memories, strict=True)):
        context = harness.ids(item.package.text)
        natives += [(i, "native", context), (i, "none", context[: memory.sink])]
        for shape in shapes if harness.wmatrix is not None else ():
            natives += _controls(harness, i, memory, context, shape, controls)
    texts = [Text((), ids) for _, _, ids in natives if ids]
    states = iter(_unique_states(harness, texts))
    for i, name, ids in natives:
        arms[i][name] = (next(states),) if ids else ()
    for i, item in enumerate(items):
        if item.other is not None:
            arms[i]["wrong_memory"] = (harness.flat(item.other),)
    _with_tails(harness, memories, shapes, arms)
    return arms


def score(
    harness: EvalHarness, items: Sequence[Item], arms: Sequence[Mapping[str, Segments]]
) -> Iterator[tuple[int, str, Tensor]]:
    """The index of each item with each of its conditions and the log probabilities [scored, V]
    there; *native* of every item comes before all others. The same states are scored once: plans
    that buy the same share a control."""
    natives: list[list[str]] = [["native"] for _ in items]
    others: list[list[str]] = [[name for name in arm if name != "native"] for arm in arms]
    for names in (natives, others):
        alike: dict[tuple[int, ...], list[str]] = {}
        for i, wanted in enumerate(names):
            for name in wanted:
                alike.setdefault((i, *map(id, arms[i][name])), []).append(name)
        groups = [(key[0], group) for key, group in alike.items()]
        texts = [Text(arms[i][group[0]], items[i].ids) for i, group in groups]
        for k, logprobs in harness.reader.logprobs(texts, [items[i].scored for i, _ in groups]):
            i, group = groups[k]
            yield from ((i, name, logprobs) for name in group)


def conditions(
    harness: EvalHarness, item: Item, shapes: Sequence[PlanShape] = (MAP_ALONE,)
) -> dict[str, Tensor]:
    """Log probabilities [scored, V] of one item in each arm of `arms_of`."""
    arms = arms_of(harness, [item], shapes)
    return {name: logprobs for _, name, logprobs in score(harness, [item], arms)}


def _memory(harness: EvalHarness, item: Item) -> Memory:
    """An item's memory in the target, as far as the map alone makes it."""
    bases = {"memory": harness.flat(item.package)}
    ids, tokenizer = harness.ids(item.package.text), load_tokenizer(str(harness.target))
    if harness.wmatrix is not None:
        bases["tokens_only"] = harness.flat(item.package, masked=True)
    index = None
    if len(ids) == len(bases["memory"]):  # else the map reads no tokens, and has rows of its own
        tokens = tokenize(tokenizer, item.package.text)
        first, vectors = len(ids) - len(tokens.ids), word_vectors(harness.target)
        index = PassageIndex.of(item.package.text, tokens.spans, first, vectors=vectors)
    else:
        ids = [0] * len(bases["memory"])
    quoting = tokenizer if item.asks else None
    return Memory(ids, harness.sink(), item.question, index, bases, quoting)


def _reread(harness: EvalHarness, memories: Sequence[Memory], shapes: Sequence[PlanShape]) -> None:
    """Read every passage that any of the shapes re-reads after the states before it alone, as
    `align.reread` does."""
    wanted = [
        (memory, base, span)
        for memory in memories
        for base in memory.bases
        for span in sorted({s for shape in shapes for s in memory.chosen(shape.reread)})
    ]
    texts = [Text((m.bases[base][: s[0]],), m.ids[slice(*s)]) for m, base, s in wanted]
    for (memory, base, span), states in zip(wanted, harness.reader.states(texts), strict=True):
        memory.passages[base, span] = states.to(harness.dtype)  # as the memory's own rows


def _controls(
    harness: EvalHarness,
    i: int,
    memory: Memory,
    context: list[int],
    shape: PlanShape,
    controls: Sequence[str],
) -> Iterator[tuple[int, str, list[int]]]:
    """The ids that each control of a plan reads, as many as the plan's operations buy."""
    assert harness.wmatrix is not None
    tokens, sink = len(memory.ids) - memory.sink, memory.sink
    prefill, mapped = harness.prefill, map_flop(harness.wmatrix)
    tail, reread = min(shape.tail, tokens), min(shape.reread, tokens)
    flop = plan_flop(mapped, prefill, tokens, tail, reread, sink)
    budget = prefill.affordable(flop, sink, tokens)
    for name in controls:
        if name != "passages" or shape.reread:
            ids = [*context[:sink], *memory.control(name, budget, shape.reread)]
            yield i, shape.condition(name), ids


def _with_tails(
    harness: EvalHarness,
    memories: Sequence[Memory],
    shapes: Sequence[PlanShape],
    arms: Sequence[dict[str, Segments]],
) -> None:
    """Add the memory arms of every shape, their tails read after the states before them."""
    tails: list[tuple[dict[str, Segments], str, Text]] = []
    for memory, arm in zip(memories, arms, strict=True):
        plain = [PlanShape(shape.tail) for shape in shapes if memory.tokenizer is not None]
        for shape in dict.fromkeys((MAP_ALONE, *plain, *shapes)):
            for base in memory.bases:
                before = memory.laid_over(base, shape)
                arm[shape.condition(base)] = before
                if shape.tail:
                    ids = memory.ids[memory.begin_of(shape.tail) :]
                    tails.append((arm, shape.condition(base), Text(before, ids)))
    _read_on(harness, tails)
    # The tail is that of the same shape without passages: the quotes follow it.
    _read_on(
        harness,
        [
            (arm, shape.condition("quoted"), Text(before, ids))
            for memory, arm in zip(memories, arms, strict=True)
            for shape in shapes
            if memory.tokenizer is not None and shape.reread
            for before in [arm[PlanShape(shape.tail).condition()]]
            for ids in [memory.quotes(shape.reread)]
        ],
    )


def _read_on(harness: EvalHarness, texts: Sequence[tuple[dict[str, Segments], str, Text]]) -> None:
    """Add arms by name: the states before a text, and those of its ids, if it has any."""
    states = harness.reader.states([text for _, _, text in texts])
    for (arm, name, text), rows in zip(texts, states, strict=True):
        arm[name] = (*text.before, rows) if text.ids else text.before


def _unique_states(harness: EvalHarness, texts: Sequence[Text]) -> Iterator[Tensor]:
    """The states of texts without states before them, each read once: plans of one cost have one
    control."""
    first: dict[tuple[int, ...], int] = {}
    order = [first.setdefault(tuple(text.ids), len(first)) for text in texts]
    states = harness.reader.states([Text((), ids) for ids in first])
    return (states[place] for place in order)
