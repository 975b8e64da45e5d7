"""Which of the target's states matter: how strongly its predictions hang on each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.build_cache import build_cache
from awareness_vllm.models.hf import last_logits, states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.features import flat_states, split_states

SHRINKAGE = 0.01
"""Share of a layer's mean that each of its dims gets: none is unimportant for certain."""


def importance(
    reader: Reader, pairs: Sequence[tuple[str, str]], seed: int = 0, *, progress: bool = False
) -> Tensor:
    """The diagonal of the Fisher information of the target's states, [O], up to a factor.

    An error δ in a state costs about δ²·E[g²] nats, where g is the gradient of the log-likelihood
    of what the target itself would say next. So weighted, a regression spends its rank where the
    target looks: in few layers, and in keys more than in values (docs/fidelity-log.md).

    Args:
        pairs: contexts, whose states are judged, and continuations, at whose tokens they are.
    """
    tokenizer = load_tokenizer(str(reader.target))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(reader.target_geometry.width)
    sink = len(reader.sink)
    for context, continuation in tqdm(pairs, desc="importance", disable=not progress):
        ids = tokenize(tokenizer, continuation).ids
        read = prompt_ids(context, reader.sink, reader.target)
        keys, values = states(reader.target_model, read)
        flat = flat_states(reader.target_geometry, keys, values)[sink:].requires_grad_()
        sinks = [[state[:sink] for state in kind] for kind in (keys, values)]
        cache = build_cache(
            reader.target_geometry, split_states(reader.target_geometry, flat), sinks
        )
        positions = torch.arange(len(read), len(read) + len(ids))[None]
        logits = last_logits(
            reader.target_model, ids, len(ids), past_key_values=cache, position_ids=positions
        )
        said = logits.float().log_softmax(-1)
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(said.gather(1, drawn).sum(), flat)
        total += gradient.square().sum(0) / len(ids)
    return total


def output_weight(information: Tensor, spread: Tensor, layer_widths: Sequence[int]) -> Tensor:
    """Weights of standardised targets [O] from their information and their spread.

    Args:
        information: [O], of targets in their own units.
        spread: [O], the targets' standard deviations.
        layer_widths: of the keys of each layer, then of the values.
    """
    standardised = information * spread.square()
    parts = standardised.split(list(layer_widths))
    return torch.cat([part + SHRINKAGE * part.mean() for part in parts]).clamp_min(1e-12).sqrt()
