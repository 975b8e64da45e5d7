"""The beginning of a prompt: the memories that a request named, as they stand one after another."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.passages.index import Span
from awareness_vllm.passages.quotes import NO_QUOTES, Quoting, is_question, quote
from awareness_vllm.serving.params import Key, LoadParams, Part, edition_name, passage_params
from awareness_vllm.serving.resolved_memory import OWN, Promise, ResolvedMemory
from awareness_vllm.trust.policy import Signers


@dataclass(frozen=True)
class PassageRequest:
    """A request of the server's own that computes a passage of a prompt's memory number `memory`:
    its ids and its load plan."""

    memory: int
    span: Span
    ids: list[int]
    plan: LoadParams


@dataclass(frozen=True)
class Prompt:
    """One memory after another, loaded but for the last `tail` tokens; with a `tail` of None the
    target reads all of them. In a chat, the ids of the template's `head` stand before them.

    A question may have `budget` tokens of each memory re-read in place: `rereads` are the spans
    that are laid over each, with `reread_reason` why some are not. Or it may have as many as
    `quoting` says quoted: `quotes` are these spans, and `quote_ids` what stands for them between
    the memories and the question.

    Of each memory `editions` says whether its edition is loaded; empty for none. Unless all are, a
    prompt with a `refusal` is refused.
    """

    memories: tuple[ResolvedMemory, ...]
    tail: int | None
    tenant: str = ""
    caller_salt: str = ""
    head: tuple[int, ...] = ()
    reason: str = ""
    budget: int = 0
    rereads: tuple[tuple[Span, ...], ...] = ()
    reread_reason: str = ""
    quoting: Quoting = NO_QUOTES
    quotes: tuple[tuple[Span, ...], ...] = ()
    quote_ids: tuple[int, ...] = ()
    editions: tuple[bool, ...] = ()
    refusal: QualityUnreachable | None = None

    def passages(self, question: str) -> list[tuple[Span, ...]]:
        """The spans of each memory that a question points at and may have re-read: but for those
        which are read natively with the last memory's tail, and of editions. Takes milliseconds."""
        ends = [len(memory.ids) for memory in self.memories]
        ends[-1] -= self.tail or 0
        return [
            tuple(span for span in memory.index.choose(question, self.budget) if span[0] < end)
            if memory.index is not None and memory.prefix < end and not self.is_edition(i)
            else ()
            for i, (memory, end) in enumerate(zip(self.memories, ends, strict=True))
        ]

    def passage_requests(self, question: str) -> list[PassageRequest]:
        """The requests for the passages that a question points at, if it may re-read any."""
        if not self.budget or self.params is None:
            return []
        parts = self.params.parts[-len(self.memories) :]
        return [
            PassageRequest(
                i, span, memory.ids[: span[1]], passage_params(parts[i], span, self.tenant)
            )
            for i, (memory, spans) in enumerate(
                zip(self.memories, self.passages(question), strict=True)
            )
            for span in spans
        ]

    def with_quotes(
        self, questions: Sequence[str], tokenize: Callable[[str], Sequence[int]]
    ) -> Prompt:
        """The same memories, with the passages that questions point at quoted after them, if these
        may have any; of editions, which are exact, only if that was said. Takes milliseconds."""
        quoting = self.quoting
        if not (quoting.budget and self.loads):
            return self
        if quoting.automatic and not any(map(is_question, questions)):
            return self
        asked = "\n".join(questions)
        spans = [
            memory.index.choose(asked, quoting.budget)
            if memory.index is not None and not (quoting.automatic and self.is_edition(i))
            else ()
            for i, memory in enumerate(self.memories)
        ]
        texts = [
            memory.text[0][begin:end]
            for memory, own in zip(self.memories, self._characters(spans), strict=True)
            for begin, end in own
            if memory.text is not None
        ]
        if not (quoted := quote(texts)):
            return self
        return replace(
            self,
            quotes=tuple(spans),
            quote_ids=tuple(tokenize(quoted)),
            budget=0 if quoting.instead else self.budget,
        )

    def _characters(self, spans: Sequence[Sequence[Span]]) -> list[list[tuple[int, int]]]:
        """The character ranges of each memory's spans in its text."""
        return [
            [memory.index.characters(span) for span in own] if memory.index is not None else []
            for memory, own in zip(self.memories, spans, strict=True)
        ]

    def with_passages(self, outcomes: Sequence[tuple[PassageRequest, str]]) -> Prompt:
        """The same memories with the passages of these requests laid over, but for those whose
        outcome is a reason against it."""
        spans: list[list[Span]] = [[] for _ in self.memories]
        for request, reason in outcomes:
            if not reason:
                spans[request.memory].append(request.span)
        reasons = [reason for _, reason in outcomes if reason]
        return self.with_rereads([tuple(own) for own in spans], reasons[0] if reasons else "")

    def with_rereads(self, rereads: Sequence[tuple[Span, ...]], reason: str = "") -> Prompt:
        """The same memories with these spans laid over; `reason` says why others are not."""
        return replace(self, rereads=tuple(rereads), reread_reason=reason)

    def with_head(self, head: Sequence[int]) -> Prompt:
        """The same memories after a chat template's head."""
        return replace(self, head=tuple(head))

    def recomputed(self, reason: str = "") -> Prompt:
        """The same memories, read by the target itself; the response says for what `reason`."""
        return replace(self, tail=None, reason=reason, rereads=(), editions=())

    def with_editions(self, kept: Sequence[bool]) -> Prompt:
        """The same memories, by their editions where these are kept. All of them together are
        exact: nothing has to be read natively for the sake of quality."""
        if not any(kept) or not (self.loads or all(kept)):
            return self
        tail = 0 if kept[-1] else self.tail
        return replace(self, tail=tail, reason="", editions=tuple(kept), refusal=None)

    @property
    def loads(self) -> bool:
        """Whether anything is loaded."""
        return self.tail is not None

    @property
    def skips(self) -> list[int]:
        """How many of each memory's first ids are left out: they stand only at the beginning."""
        skips = [memory.prefix for memory in self.memories]
        return skips if self.head else [0, *skips[1:]]

    @functools.cached_property
    def ids(self) -> list[int]:
        parts = zip(self.memories, self.skips, strict=True)
        return [*self.head, *(id for memory, skip in parts for id in memory.ids[skip:])]

    @functools.cached_property
    def begins(self) -> list[int]:
        """The position of each memory's first id."""
        counts = [len(m.ids) - skip for m, skip in zip(self.memories, self.skips, strict=True)]
        return [*itertools.accumulate(counts[:-1], initial=len(self.head))]

    def edition_key(self, i: int) -> Key | None:
        """The key of memory i's edition, which is read after the ids that precede it here; None
        where its own states are exact already."""
        memory, begin = self.memories[i], self.begins[i]
        if memory.wmatrix is None and memory.origin != "claimed" and not begin:
            return None
        return memory.digest, edition_name(self.ids[:begin])

    def edition_ids(self, i: int) -> list[int]:
        """The ids of memory i's edition, after those that precede it."""
        return self.ids[: self.begins[i] + len(self.memories[i].ids) - self.skips[i]]

    @functools.cached_property
    def params(self) -> LoadParams | None:
        """The load plan for the connector; None where nothing is loaded."""
        if self.tail is None:
            return None
        name = head_name(self.head)
        head = [Part(memory=name, digest=name, tokens=len(self.head))] if self.head else []
        parts = [self._part(i) for i in range(len(self.memories))]
        return LoadParams(
            parts=(*head, *parts),
            tail=self.tail,
            tenant=self.tenant,
            caller_salt=self.caller_salt,
        )

    def _part(self, i: int) -> Part:
        memory, skip = self.memories[i], self.skips[i]
        fields: dict[str, Any] = {"wmatrix": memory.wmatrix.digest if memory.wmatrix else ""}
        fields |= {"skip": skip, "signers": memory.signers}
        fields |= {"rereads": self.rereads[i] if self.rereads else ()}
        if self.is_edition(i):
            # It was read where it stands, after what precedes it: so many of its ids are not its.
            name = edition_name(self.ids[: self.begins[i]])
            fields = {"wmatrix": name, "skip": self.begins[i]}
            fields["signers"] = Signers(package=memory.signed_by)
        tokens = len(memory.ids) - skip
        return Part(memory=memory.id, digest=memory.digest, tokens=tokens, **fields)

    def is_edition(self, i: int) -> bool:
        """Whether memory i is loaded by its edition."""
        return bool(self.editions) and self.editions[i]

    @property
    def promises(self) -> list[Promise]:
        """What each memory keeps. A copy keeps all of itself where it was captured, at the
        beginning of a prompt; anywhere else nobody has measured it."""
        return [self._promise(i) for i in range(len(self.memories))]

    def _promise(self, i: int) -> Promise:
        memory = self.memories[i]
        if self.tail is None or self.is_edition(i):
            return OWN
        if self.begins[i] and not memory.wmatrix:
            return Promise()
        spans = self.rereads[i] if self.rereads else ()
        # Certificates measure what a budget buys, of which a choice may leave a rest.
        whole = spans and not self.reread_reason
        reread = self.budget if whole else sum(end - begin for begin, end in spans)
        return memory.promise(self.tail if i == len(self.memories) - 1 else 0, reread)

    @property
    def retention(self) -> list[float | None]:
        """The retention of each memory's promise."""
        return [promise.retention for promise in self.promises]

    def promised(self) -> dict[str, list[Any]]:
        """The fields of `report` that say what each memory keeps."""
        promises = self.promises
        return {
            "retention": [promise.retention for promise in promises],
            "basis": [promise.basis for promise in promises],
            "margin": [promise.margin for promise in promises],
        }

    def report(self) -> dict[str, Any]:
        """The report on the memories for a response."""
        return {
            "ids": [memory.id for memory in self.memories],
            "plan": "load" if self.loads else "recompute",
            "tokens": sum(memory.tokens for memory in self.memories),
            **({"reason": self.reason} if self.reason else {}),
            "native_tail": self.tail,
            **({"reread": self.reread_report()} if self.budget and self.loads else {}),
            **({"quoted": self._quoted()} if self.quotes else {}),
            **self.promised(),
            "edition": [self.is_edition(i) for i in range(len(self.memories))],
            "origin": [memory.origin for memory in self.memories],
            "signed_by": [memory.signers.model_dump() for memory in self.memories],
        }

    def reread_report(self) -> dict[str, Any]:
        """The report on what was re-read: tokens, the characters of each memory's text, and why
        something was not."""
        reason = self.reread_reason or self._no_passages()
        return {**self._shown(self.rereads), **({"reason": reason} if reason else {})}

    def _quoted(self) -> dict[str, Any]:
        """The report on quotes: their tokens in the prompt, and the characters they quote."""
        return {**self._shown(self.quotes), "tokens": len(self.quote_ids)}

    def _shown(self, spans: Sequence[tuple[Span, ...]]) -> dict[str, Any]:
        """The tokens of some spans, and their characters in each memory's text."""
        spans = spans or ((),) * len(self.memories)
        tokens = sum(end - begin for own in spans for begin, end in own)
        return {"tokens": tokens, "characters": self._characters(spans)}

    def _no_passages(self) -> str:
        """Why nothing of some memory can be re-read; "" where something can, or is exact."""
        mapped = [memory for memory in self.memories if memory.wmatrix is not None]
        return "a map without the memory's tokens" if any(m.text is None for m in mapped) else ""


def head_name(ids: Sequence[int]) -> str:
    """A chat template's head as the workers know it: no memory has such an ID."""
    return f"head_{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]}"
