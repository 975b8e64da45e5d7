"""The evaluation harness: both models and the map between them, and one context in five arms.

The arms, `CONDITIONS` in the code: *native* (the target reads the context), *memory* (aligned),
*tokens_only* (the map with the source's states masked), *wrong_memory* (another document's),
*none*.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory, copy, prompt_ids, realign
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import inputs_after, last_logits, load_model, states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture, read_tokens
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONDITIONS = ("native", "memory", "tokens_only", "wrong_memory", "none")


@dataclass
class EvalHarness:
    """Both models and the map between them.

    Without a map, source and target must be one model; without a source nothing is captured, and
    packages must exist already.

    Raises:
        BadInput, UnsupportedModel: models that differ from the map's, or from each other without
            one.
    """

    source: Path | None
    target: Path
    wmatrix: WMatrix | None

    def __post_init__(self) -> None:
        self.target = resolve_folder(self.target)
        target = source = geometry_of(self.target)
        if self.source is not None:
            self.source = resolve_folder(self.source)
            source = geometry_of(self.source)
        elif self.wmatrix is not None:
            source = self.wmatrix.manifest.source
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
            for role, model, expected in (
                ("source", source, self.wmatrix.manifest.source),
                ("target", target, self.wmatrix.manifest.target),
            ):
                if not model.same_model(expected):
                    raise UnsupportedModel(
                        f"the W-Matrix has another {role}",
                        found=model.identity,
                        expected=expected.identity,
                        remedy=f"give the {role} model that the W-Matrix was fitted for",
                    )
        self.recent: dict[str, Package] = {}
        self.target_model = load_model(self.target)

    @functools.cached_property
    def source_model(self) -> PreTrainedModel:
        """The source model. Raises BadInput where the harness has none."""
        if self.wmatrix is None:
            return self.target_model
        if self.source is None:
            raise BadInput(
                "no text can be captured",
                found="no source model",
                expected="the folder of the model that makes the memories",
            )
        return load_model(self.source)

    def package(self, text: str) -> Package:
        """The source's capture of a text; the last two are cached, one is the other's wrong
        memory."""
        if text not in self.recent:
            self.recent = dict([*self.recent.items()][-1:])
            folder = self.source or self.target
            self.recent[text] = capture(folder, text, model=self.source_model)
        return self.recent[text]

    def memory(self, package: Package, *, masked: bool = False) -> AlignedMemory:
        """The aligned memory of a package, with `masked` of its tokens alone."""
        if self.wmatrix is None:
            return copy(package)
        embed = self.target_model.get_input_embeddings()
        return realign(package, self.wmatrix, self.target, embed, dtype=self.dtype, masked=masked)

    def ids(self, text: str) -> list[int]:
        """The target's ids of a context: the sink (or its own prefix) and the text's tokens."""
        if self.wmatrix is not None:
            return prompt_ids(text, self.wmatrix.manifest.sink, self.target)
        return read_tokens(self.target, text).ids

    def sink(self) -> int:
        """The number of ids before any text."""
        return len(self.ids("x")) - len(tokenize(load_tokenizer(str(self.target)), "x").ids)

    @torch.inference_mode()
    def native(self, ids: list[int]) -> AlignedMemory:
        """The target's own states of these ids."""
        return AlignedMemory(ids, *states(self.target_model, ids))

    @torch.inference_mode()
    def logprobs(self, memory: AlignedMemory, ids: list[int], scored: int, tail: int = 0) -> Tensor:
        """Log probabilities [scored, V] of the last `scored` ids, read after a memory whose last
        `tail` tokens are read natively."""
        memory, recomputed = cut_tail(memory, tail)
        ids = [*recomputed, *ids]
        inputs = inputs_after(memory.keys, memory.values, ids)
        logits = last_logits(self.target_model, ids, scored + 1, **inputs)
        return logits[:-1].float().log_softmax(-1)

    def conditions(
        self,
        package: Package,
        other: Package | None,
        ids: list[int],
        scored: int,
        tails: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Log probabilities [scored, V] of the last `scored` ids in each arm; for each of `tails`
        also of *memory* and *tokens_only* with a native tail. Without an `other` package there is
        no *wrong_memory*, without a map no *tokens_only*."""
        context_ids, sink = self.ids(package.text), self.sink()
        none = self.native(context_ids[:sink] or ids[:1])
        if not sink:
            # A target without a sink starts with the prompt itself.
            none = AlignedMemory([], [k[:0] for k in none.keys], [v[:0] for v in none.values])
        memories = {
            "native": self.native(context_ids),
            "memory": self.memory(package),
            "none": none,
        }
        if other is not None:
            memories["wrong_memory"] = self.memory(other)
        if self.wmatrix is not None:
            memories["tokens_only"] = self.memory(package, masked=True)
        logprobs = {name: self.logprobs(memories[name], ids, scored) for name in memories}
        for tail in tails:
            for name in {"memory", "tokens_only"} & memories.keys():
                with_tail = self.logprobs(memories[name], ids, scored, tail)
                logprobs[tail_condition(tail, name)] = with_tail
        return logprobs


def tail_condition(tail: int, condition: str = "memory") -> str:
    """The name of a condition whose last `tail` tokens are read natively."""
    return f"{condition}_tail_{tail}" if tail else condition


def cut_tail(memory: AlignedMemory, tail: int) -> tuple[AlignedMemory, list[int]]:
    """A memory without its last `tail` tokens, and their ids; it keeps at least one token."""
    end = max(min(1, len(memory.ids)), len(memory.ids) - tail)
    keys, values = [k[:end] for k in memory.keys], [v[:end] for v in memory.values]
    return AlignedMemory(memory.ids[:end], keys, values), memory.ids[end:]


def token_nll(logprobs: Tensor, ids: Sequence[int]) -> Tensor:
    """NLL in nats of each of T ids but the first, [T - 1], by `logprobs` [T - 1, V]."""
    return -logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def kl_divergence(native: Tensor, logprobs: Tensor) -> Tensor:
    """KL divergence in nats of each token's prediction from the native one, [T], of [T, V]."""
    return (native.exp() * (native - logprobs)).sum(-1)
