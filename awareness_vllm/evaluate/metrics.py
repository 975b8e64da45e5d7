"""The alignment metrics of the published interface, measured through the target on held-out texts.

What counts more is in the certificate beside them: retention and fact recall ("task transfer
accuracy"). The reconstruction error is measured by the fit (`solve.round_trip_error`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.models.hf import inputs_after
from awareness_vllm.wmatrix.certificate import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STABLE = 10.0
"""The factor of the native gradients' norm within which gradients are stable."""


def alignment_metrics(harness: EvalHarness, pairs: Sequence[tuple[str, list[int]]]) -> Metrics:
    """The metrics' means over pairs of a context and the ids that follow it."""
    cosines, overlaps, ratios = [], [], []
    for context, ids in pairs:
        memory = harness.memory(harness.packages([context])[context])
        native = harness.native(memory.ids)
        sink = harness.sink()
        cosines.append(cosine(memory, native, sink))
        ours, theirs = (attention(harness.target_model, m, ids) for m in (memory, native))
        overlaps.append(overlap(ours, theirs))
        norms = [gradient_norm(harness.target_model, m, ids) for m in (memory, native)]
        ratios.append(norms[0] / norms[1] if norms[1] else math.nan)
    return Metrics(
        semantic_preservation=tuple(torch.stack(cosines).mean(0).tolist()),
        attention_fidelity=tuple(torch.stack(overlaps).mean(0).tolist()),
        gradient_ratio=sum(ratios) / len(ratios),
        gradient_stability=all(1 / STABLE <= ratio <= STABLE for ratio in ratios),
        n=len(pairs),
    )


def cosine(memory: AlignedMemory, native: AlignedMemory, sink: int) -> Tensor:
    """The mean cosine of tokens' keys and values, joined to one vector, per layer, [layers]."""
    rows = []
    for ours, theirs in zip(_tokens(memory, sink), _tokens(native, sink), strict=True):
        rows.append(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean())
    return torch.stack(rows)


def _tokens(memory: AlignedMemory, sink: int) -> Iterator[Tensor]:
    """Each token's key and value in one row, per layer [T, 2 · H · D], without the sink."""
    for key, value in zip(memory.keys, memory.values, strict=True):
        yield torch.cat((key[sink:].flatten(1), value[sink:].flatten(1)), dim=1).float()


@torch.inference_mode()
def attention(model: PreTrainedModel, memory: AlignedMemory, ids: list[int]) -> list[Tensor]:
    """Attention weights of ids read after a memory, per layer [heads, ids, positions]."""
    with eager(model):
        out = model(
            torch.tensor([ids], device=model.device),
            **inputs_after(memory.keys, memory.values, ids),
            output_attentions=True,
            logits_to_keep=1,
        )
    return [layer[0] for layer in out.attentions]


def overlap(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The mean of 1 − total variation between two sets of distributions, per layer, [layers]."""
    return torch.stack(
        [1 - 0.5 * (a - b).abs().sum(-1).mean() for a, b in zip(ours, theirs, strict=True)]
    )


def gradient_norm(model: PreTrainedModel, memory: AlignedMemory, ids: list[int]) -> float:
    """The norm of the gradient of the ids' next-token loss in all states of the memory."""
    leaves = [s.float().clone().requires_grad_() for s in (*memory.keys, *memory.values)]
    half = len(memory.keys)
    inputs = inputs_after(leaves[:half], leaves[half:], ids)
    read = torch.tensor(ids, device=model.device)
    logits = model(read[None], **inputs).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float(), read[1:])
    gradients = torch.autograd.grad(loss, leaves)
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


@contextlib.contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model's attention can return its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
