"""The evaluation harness: both models and the map between them, and one context in five arms.

The arms, `CONDITIONS` in the code: *native* (the target reads the context), *memory* (aligned),
*tokens_only* (the map with the source's states masked), *wrong_memory* (another document's),
*none*.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory, copy, prompt_ids, realign
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.evaluate.flops import Prefill
from awareness_vllm.evaluate.reader import Reader, Text
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import inputs_after, last_logits, load_model, states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture, read_tokens
from awareness_vllm.packages.file import AnyPackage, Package, build, with_states
from awareness_vllm.wmatrix.features import joined, split_states
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONDITIONS = ("native", "memory", "tokens_only", "wrong_memory", "none")


@dataclass
class EvalHarness:
    """Both models and the map between them.

    Without a map, source and target must be one model; without a source nothing is captured, and
    packages must exist already.

    Args:
        device: of both models and of all states: "cpu", "cuda", or "auto" for cuda where there is
            one.

    Raises:
        BadInput, UnsupportedModel: models that differ from the map's, or from each other without
            one.
    """

    source: Path | None
    target: Path
    wmatrix: WMatrix | None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.target = resolve_folder(self.target)
        target = source = geometry_of(self.target)
        if self.source is not None:
            self.source = resolve_folder(self.source)
            source = geometry_of(self.source)
        elif self.wmatrix is not None:
            source = self.wmatrix.manifest.source
        self.target_geometry, self.max_positions = target, target.max_positions
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
        self.target_model = on(load_model(self.target), self.device)
        self.placed: tuple[WMatrix, WMatrix] | None = None

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
        return on(load_model(self.source), self.device)

    @functools.cached_property
    def reader(self) -> Reader:
        """The target, for many texts at once."""
        return Reader(self.target_model, self.target_geometry)

    @functools.cached_property
    def prefill(self) -> Prefill:
        """The target's operations while it reads."""
        return Prefill.of(self.target_model, self.target_geometry)

    def packages(self, texts: Sequence[str]) -> dict[str, Package]:
        """The source's captures of texts, read at once: as `capture` makes them, but without a
        digest of their states, which no file of theirs needs."""
        model, folder = self.source_model, self.source or self.target
        geometry = geometry_of(folder)
        unique = {text: read_tokens(folder, text) for text in texts}
        reader = Reader(model, geometry)
        states = reader.states([Text((), tokens.ids) for tokens in unique.values()])
        dtype = getattr(torch, geometry.dtype)
        packages = {}
        for (text, tokens), rows in zip(unique.items(), states, strict=True):
            keys, values = split_states(geometry, rows.to(dtype).contiguous())
            packages[text] = build(
                geometry=geometry_of(folder, len(tokens.ids)),
                text=text,
                tokens=tokens.ids,
                spans=tokens.spans,
                keys=keys,
                values=values,
                engine="transformers",
                versions={},
                hashed=False,
            )
        return packages

    def package(self, text: str) -> Package:
        """The source's capture of a text; the last two are cached, one is the other's wrong
        memory."""
        if text not in self.recent:
            self.recent = dict([*self.recent.items()][-1:])
            folder = self.source or self.target
            self.recent[text] = capture(folder, text, model=self.source_model)
        return self.recent[text]

    def memory(self, package: AnyPackage, *, masked: bool = False) -> AlignedMemory:
        """The aligned memory of a package, with `masked` of its tokens alone."""
        if self.wmatrix is None:
            return copy(with_states(package))
        if self.placed is None or self.placed[0] is not self.wmatrix:
            self.placed = self.wmatrix, self.wmatrix.to(self.device)
        embed, dtype = self.target_model.get_input_embeddings(), self.dtype
        with torch.device(self.device) if self.device != "cpu" else contextlib.nullcontext():
            return realign(package, self.placed[1], self.target, embed, dtype=dtype, masked=masked)

    def flat(self, package: AnyPackage, *, masked: bool = False) -> Tensor:
        """The `joined` states [T, W] of a package's aligned memory."""
        memory = self.memory(package, masked=masked)
        return joined(memory.keys, memory.values).to(self.device)

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


def cut_tail(memory: AlignedMemory, tail: int) -> tuple[AlignedMemory, list[int]]:
    """A memory without its last `tail` tokens, and their ids; it keeps at least one token."""
    end = max(min(1, len(memory.ids)), len(memory.ids) - tail)
    keys, values = [k[:end] for k in memory.keys], [v[:end] for v in memory.values]
    return AlignedMemory(memory.ids[:end], keys, values), memory.ids[end:]


def token_nll(logprobs: Tensor, ids: Sequence[int]) -> Tensor:
    """NLL in nats of each of T ids but the first, [T - 1], by `logprobs` [T - 1, V]."""
    return -logprobs.gather(1, torch.tensor(ids[1:], device=logprobs.device)[:, None])[:, 0]


def kl_divergence(native: Tensor, logprobs: Tensor) -> Tensor:
    """KL divergence in nats of each token's prediction from the native one, [T], of [T, V]."""
    return (native.exp() * (native - logprobs)).sum(-1)


def on(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A model on a device. On cuda its float32 products round to TF32: a tenth of the time, and
    less than the rounding of the states that a server holds."""
    if device == "cpu":
        return model
    torch.backends.cuda.matmul.allow_tf32 = True
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved
