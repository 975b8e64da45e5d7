"""The importance of the target's states: how strongly its predictions depend on each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.hf import states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.features import flat_states

SHRINKAGE = 0.01
"""Share of a layer's mean importance that is added to each of its dims: none is surely zero."""


def importance(
    reader: Reader, pairs: Sequence[tuple[str, str]], seed: int = 0, *, progress: bool = False
) -> Tensor:
    """The diagonal of the Fisher information of the target's states, [O], up to a factor.

    An error δ in a state costs about δ²·E[g²] nats, where g is the gradient of the log-likelihood
    of the target's own next token. So weighted, a regression spends its rank where the target
    attends: in few layers, and in keys more than in values (docs/fidelity-log.md).

    Args:
        pairs: contexts, whose states are weighed, and continuations, at whose tokens they are.
    """
    tokenizer = load_tokenizer(str(reader.target))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(reader.target_geometry.width, device=reader.device)
    sink = len(reader.sink)
    for context, continuation in tqdm(pairs, desc="importance", disable=not progress):
        ids = tokenize(tokenizer, continuation).ids
        read = prompt_ids(context, reader.sink, reader.target)
        keys, values = states(reader.target_model, read)
        flat = flat_states(reader.target_geometry, keys, values)[sink:].requires_grad_()
        sinks = [state[:sink] for state in keys], [state[:sink] for state in values]
        logits = logits_after(reader, sinks, flat, [len(flat)], [ids])
        logprobs = logits.float().log_softmax(-1)
        sample = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(
            logprobs.gather(1, sample.to(logprobs.device)).sum(), flat
        )
        total += gradient.square().sum(0) / len(ids)
    return total


def output_weight(information: Tensor, std: Tensor, layer_widths: Sequence[int]) -> Tensor:
    """Weights of standardised targets [O] from their Fisher information.

    Args:
        information: [O], of targets in their own units.
        std: [O], the targets' standard deviations.
        layer_widths: of each layer's keys, then of each layer's values.
    """
    standardised = information * std.square()
    parts = standardised.split(list(layer_widths))
    return torch.cat([part + SHRINKAGE * part.mean() for part in parts]).clamp_min(1e-12).sqrt()
