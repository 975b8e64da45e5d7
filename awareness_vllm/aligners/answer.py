"""Answers from memories without a server: the target in transformers, one question at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from awareness_vllm.align.realign import AlignedMemory, copy, realign
from awareness_vllm.align.reread import reread as read_again
from awareness_vllm.errors import BadInput
from awareness_vllm.models.chat import ChatPrompt, chat_prompt
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import inputs_after, load_model, states
from awareness_vllm.models.rope import rerotate
from awareness_vllm.models.tokens import load_tokenizer, prefix_ids, tokenize
from awareness_vllm.packages.file import AnyPackage, with_states
from awareness_vllm.passages import BUDGET
from awareness_vllm.passages.index import MIN, PassageIndex
from awareness_vllm.passages.quotes import is_question, quote
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.wmatrix.file import load
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry
from awareness_vllm.wmatrix.verdict import check_fits, check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPLETION = "\n\nQuestion: {}\nAnswer:"
"""A question to a model without a chat template; its answer is one line."""
SAMPLE = 256
"""Tokens that are read natively to estimate how long all of them take."""

Stream = Callable[[str], None]
"""Sees an answer's text piece by piece."""


@dataclass(frozen=True)
class Passage:
    """A passage that the target read itself, `quoted` before the question or in place: characters
    begin … end-1 of the memory's text, in `tokens`."""

    begin: int
    end: int
    tokens: int
    text: str
    quoted: bool


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        basis: "exact" for a memory of the target itself, otherwise "aligned".
        standing: what the W-Matrix is certified to keep, in words; empty for an exact memory.
        passages: what the target read itself; `note` says why nothing.
        memory_tokens, question_tokens: of the target; it read the passages and the question, which
            has the quotes.
        align_s: seconds to align the memory, once for all questions.
        answer_s: seconds from then to the first token.
        native_s: an estimate of the seconds in which the target reads the memory's text itself.
    """

    text: str
    basis: str
    standing: str
    passages: tuple[Passage, ...]
    note: str
    memory_tokens: int
    question_tokens: int
    align_s: float
    answer_s: float
    native_s: float

    @property
    def native_tokens(self) -> int:
        """Tokens that the target read itself."""
        in_place = sum(passage.tokens for passage in self.passages if not passage.quoted)
        return in_place + self.question_tokens


class OfflineTarget:
    """A target model that answers from memories.

        target = OfflineTarget("models/gemma3-270m", ["pair.wmatrix"])
        answer = target.use(verify(path)).ask("Where does Anna Kowalski work?")

    Args:
        model: a Hugging Face folder, or a name in the local hub cache.
        wmatrices: W-Matrix files or folders of them, by default `$AWARENESS_HOME/wmatrices`.

    Raises:
        UnsupportedModel: a model that is not there, or that cannot be loaded.
        WMatrixCorrupt: a file that is no W-Matrix.
    """

    def __init__(self, model: str | Path, wmatrices: Sequence[str | Path] | None = None) -> None:
        self.folder = resolve_folder(model)
        self.geometry = geometry_of(self.folder)
        self.registry = Registry.read(wmatrices)
        self.model: PreTrainedModel = load_model(self.folder)
        self.tokenizer = load_tokenizer(str(self.folder))

    def use(self, package: AnyPackage, name: str = "") -> OfflineMemory:
        """A memory of a package, to ask about; `name` is for messages.

        Raises:
            NoWMatrix: no map leads from its model to this one.
            UnsupportedRequest: a sliding window has lost states.
            PackageCorrupt: states that are not plausible.
            ContextTooLong: it does not fit into the model's window.
        """
        return OfflineMemory(self, package, name or package.manifest.name or "")

    def entry(self, package: AnyPackage, name: str) -> WMatrixEntry | None:
        """The map for a package; None where it is the model's own. Raises NoWMatrix."""
        is_latent = package.manifest.latent is not None
        if package.geometry.same_model(self.geometry) and not is_latent:
            return None
        check_positions(name, package.geometry, self.geometry)
        return self.registry.find_for(package.manifest, self.geometry)

    def prompt(self, question: str, raw: bool) -> tuple[ChatPrompt, bool]:
        """The ids around a memory for a question, and whether the answer ends with its line.

        Raises:
            BadInput: no question, or one that is not Unicode.
        """
        if not question.strip():
            raise BadInput(
                "there is no question", found=repr(question), expected="a question in words"
            )
        plain = tokenize(self.tokenizer, question).ids
        if raw:
            return ChatPrompt([], plain), False
        if (chat := chat_prompt(self.folder, question)) is not None:
            return chat, False
        return ChatPrompt([], tokenize(self.tokenizer, COMPLETION.format(question)).ids), True

    @torch.inference_mode()
    def read(self, ids: list[int], memory: AlignedMemory) -> tuple[int, dict[str, Any]]:
        """The likeliest token after a memory and these ids, and the inputs for what follows."""
        inputs = inputs_after(memory.keys, memory.values, ids, self.model.dtype)
        logits = self.model(torch.tensor([ids]), logits_to_keep=1, **inputs).logits
        return int(logits[0, -1].argmax()), inputs

    @torch.inference_mode()
    def continuation(self, token: int, inputs: dict[str, Any]) -> Iterator[int]:
        """The likeliest tokens from one on, until the model ends its text."""
        ends = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        position = inputs["position_ids"][:, -1:]
        while token not in (ends if isinstance(ends, list) else [ends]):
            yield token
            position = position + 1
            logits = self.model(
                torch.tensor([[token]]),
                past_key_values=inputs["past_key_values"],
                position_ids=position,
            ).logits
            token = int(logits[0, -1].argmax())

    def native_seconds(self, ids: list[int]) -> float:
        """An estimate of the seconds in which the model reads these ids."""
        sample = ids[:SAMPLE]
        states(self.model, sample[:16])  # the first pass also maps weights and wakes threads
        started = time.perf_counter()
        states(self.model, sample)
        return (time.perf_counter() - started) * len(ids) / len(sample)


class OfflineMemory:
    """A memory in a target's cache, from `OfflineTarget.use`."""

    def __init__(self, target: OfflineTarget, package: AnyPackage, name: str) -> None:
        self.target, self.package, self.name = target, package, name
        self.entry = target.entry(package, name)
        check_fits(f"memory {name}", package.manifest.rows, 1, target.geometry.max_positions)
        wmatrix = load(self.entry.path, digest=self.entry.digest) if self.entry else None
        started = time.perf_counter()
        if wmatrix is None:
            self.aligned, self.first = copy(with_states(package)), len(prefix_ids(target.tokenizer))
        else:
            embed, dtype = target.model.get_input_embeddings(), target.model.dtype
            self.aligned = realign(package, wmatrix, target.folder, embed, dtype=dtype)
            self.first = len(wmatrix.manifest.sink)
        self.align_s = time.perf_counter() - started
        self.native_s = target.native_seconds(self.aligned.ids)
        self.index = None
        if wmatrix is not None and package.manifest.has_text:
            spans = tokenize(target.tokenizer, package.text).spans
            vectors = word_vectors(target.folder)
            self.index = PassageIndex.of(package.text, spans, self.first, vectors=vectors)

    def ask(
        self,
        question: str,
        *,
        quoted: int = BUDGET,
        reread: int = BUDGET,
        max_tokens: int = 64,
        raw: bool = False,
        stream: Stream = lambda text: None,
    ) -> Answer:
        """The likeliest answer to a question.

        Args:
            quoted: tokens of the memory at most that stand once more before the question.
            reread: tokens of it at most that are read natively in place, where none are quoted.
            max_tokens: of the answer.
            raw: the question is the prompt as it is: no chat template, no "Question:".

        Raises:
            BadInput: no question, or one that is not Unicode.
            ContextTooLong: memory and question do not fit into the model's window.
            UnsupportedModel, UnsupportedRequest: a chat template that has no place for memories.
        """
        target, limit = self.target, self.target.geometry.max_positions
        prompt, one_line = target.prompt(question, raw)
        tokens = len(prompt.head) + len(self.aligned.ids)
        check_fits(f"memory {self.name}", tokens, len(prompt.rest), limit)
        started = time.perf_counter()
        may_quote = quoted and self.index and (not raw or is_question(question))
        quotes = self.index.choose(question, quoted) if self.index and may_quote else ()
        passages = [self.passage(span, quoted=True) for span in quotes]
        rest = [*self.quotes(passages), *prompt.rest]
        spans: tuple[tuple[int, int], ...] = ()
        kept = max_tokens if len(prompt.rest) + tokens + max_tokens <= limit else 1
        if not passages or len(rest) + tokens + kept > limit:
            # Quotes take no room of an answer that has it without them.
            spans = self.index.choose(question, reread) if self.index else ()
            passages, rest = [self.passage(span, quoted=False) for span in spans], prompt.rest
        memory = self.after_head(read_again(target.model, self.aligned, spans), prompt.head)
        token, inputs = target.read(rest, memory)
        answer_s = time.perf_counter() - started
        room = min(max_tokens, limit - tokens - len(rest))
        text = self.decoded(target.continuation(token, inputs), room, one_line, stream)
        return Answer(
            text=text,
            basis="aligned" if self.entry else "exact",
            standing=self.entry.manifest.standing if self.entry else "",
            passages=tuple(passages),
            note="" if passages else self.note(max(quoted, reread)),
            memory_tokens=len(self.aligned.ids),
            question_tokens=len(prompt.head) + len(rest),
            align_s=self.align_s,
            answer_s=answer_s,
            native_s=self.native_s,
        )

    @torch.inference_mode()
    def after_head(self, memory: AlignedMemory, head: list[int]) -> AlignedMemory:
        """The memory after a chat template's head, which the target reads itself, without what
        stands only at the beginning of a prompt.

        Raises:
            UnsupportedModel: learned positions, by which no memory can be moved.
        """
        if not head:
            return memory
        offset = len(head) - self.first
        own = zip(*states(self.target.model, head), self.target.geometry.layers, strict=True)
        keys, values = [], []
        for i, (key, value, layer) in enumerate(own):
            moved = rerotate(memory.keys[i][self.first :], offset, layer.positions)
            keys.append(torch.cat((key, moved.to(key.dtype))))
            values.append(torch.cat((value, memory.values[i][self.first :].to(value.dtype))))
        return AlignedMemory([*head, *memory.ids[self.first :]], keys, values)

    def decoded(self, tokens: Iterator[int], room: int, one_line: bool, stream: Stream) -> str:
        """The text of at most `room` tokens, given to `stream` as far as whole characters go."""
        ids: list[int] = []
        text = ""
        for token in tokens:
            ids.append(token)
            now = self.target.tokenizer.decode(ids).lstrip()
            ended = one_line and "\n" in now
            now = now.partition("\n")[0] if ended else now
            if ended or not now.endswith("\ufffd"):  # half a character
                stream(now[len(text) :])
                text = now
            if ended or len(ids) >= room:
                break
        return text

    def quotes(self, passages: Sequence[Passage]) -> list[int]:
        """The ids of the quotes among some passages."""
        text = quote([passage.text for passage in passages if passage.quoted])
        return tokenize(self.target.tokenizer, text).ids if text else []

    def passage(self, span: tuple[int, int], *, quoted: bool) -> Passage:
        """What a question is told of a span that the target reads."""
        assert self.index is not None
        begin, end = self.index.characters(span)
        return Passage(begin, end, span[1] - span[0], self.package.text[begin:end], quoted)

    def note(self, budget: int) -> str:
        """Why the target read nothing of the memory itself."""
        if self.entry is None:
            return "the memory is the target's own and exact"
        if self.index is None:
            return "the memory has no text"
        if budget <= 0:
            return "none asked for"
        if budget < MIN:
            return f"fewer than {MIN} tokens asked for"
        return "no passage matches the question"
