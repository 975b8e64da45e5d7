"""Calibration: the target's own judgement of the aligned memory, as gradients into the map.

The ridge fits states; what counts is what the target says after them. Each step reads one text with
both models, injects the mapped states as the target's cache, and lowers the divergence from the
target's native prediction of the text's continuation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.align.features import split_states
from awareness_vllm.anchors.spans import load_tokenizer, tokenize
from awareness_vllm.positions import apply
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.reader import Reader, last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER_SHARE = 0.2
"""The encoder's step as a share of the decoder's: it moves the latent under all outputs at once."""

LIKELY = 256
"""Tokens of each native prediction that the divergence is taken over."""


@dataclass(frozen=True)
class CalibrationConfig:
    """`steps` of Adam, one text each; `rate` is relative to each tensor's spread."""

    steps: int = 150
    rate: float = 3e-3
    warm_up: int = 10


def calibrate(
    wmatrix: WMatrix,
    reader: Reader,
    texts: Sequence[tuple[str, str]],
    config: CalibrationConfig,
    *,
    progress: bool = True,
) -> WMatrix:
    """Train encoder, decoder and bias on pairs of context and continuation.

    Args:
        texts: cycled through in order, one pair a step.
    """
    tensors = [t.float().clone() for t in (wmatrix.encode, wmatrix.decode, wmatrix.bias)]
    encode, decode, bias = (tensor.requires_grad_() for tensor in tensors)
    spread = [t.detach().std().item() for t in (encode, decode, bias)]
    shares = (ENCODER_SHARE, 1.0, 1.0)
    optimizer = torch.optim.Adam(
        [
            {"params": [t], "lr": config.rate * s * share}
            for t, s, share in zip((encode, decode, bias), spread, shares, strict=True)
        ],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / config.warm_up)
            * 0.5
            * (1 + math.cos(math.pi * step / config.steps))
        ),
    )
    losses: list[float] = []
    bar = tqdm(
        zip(range(config.steps), cycle(texts)),
        total=config.steps,
        desc="calibration",
        disable=not progress,
    )
    for _, (context, continuation) in bar:
        loss = divergence(wmatrix, reader, (encode, decode, bias), context, continuation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(kl=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return replace(
        wmatrix,
        encode=encode.detach().bfloat16(),
        decode=decode.detach().bfloat16(),
        bias=bias.detach(),
    )


def divergence(
    wmatrix: WMatrix,
    reader: Reader,
    tensors: tuple[Tensor, Tensor, Tensor],
    context: str,
    continuation: str,
) -> Tensor:
    """KL from the target's native prediction of the continuation to that after the memory.

    Over the tokens that are likely somewhere in this continuation: the head over a vocabulary of
    262k would cost more than the rest of the step.
    """
    from transformers import DynamicCache

    encode, decode, bias = (t.bfloat16() for t in tensors)
    width, target = reader.width, reader.target_geometry
    ids = tokenize(load_tokenizer(str(reader.target)), continuation).ids
    row = reader.read(context)
    native = reader.logits([*row.ids, *ids], len(ids))
    likely = native.topk(min(LIKELY, native.shape[1]), dim=-1).indices.unique()
    standard = ((row.features - wmatrix.mean) * wmatrix.scale).bfloat16()
    standard[row.blank, :width] = 0
    keys, values = split_states(target, (standard @ encode) @ decode + bias)
    positions = torch.arange(len(reader.sink), len(row.ids))
    cache = DynamicCache()
    for i, layer in enumerate(target.layers):
        key = torch.cat((wmatrix.sink_keys[i], apply(keys[i], positions, layer.positions)))
        value = torch.cat((wmatrix.sink_values[i], values[i].float()))
        key, value = (s.bfloat16().transpose(0, 1)[None] for s in (key, value))
        cache.update(key, value, i)
    with only_tokens(reader.target_model, likely):
        logits = last_logits(
            reader.target_model,
            ids,
            len(ids),
            past_key_values=cache,
            position_ids=torch.arange(len(row.ids), len(row.ids) + len(ids))[None],
        )
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(-1),
        native[:, likely].float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


@contextlib.contextmanager
def only_tokens(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """Within, the model's head has only these output tokens [N]; its other steps stay its own."""
    head = model.get_output_embeddings()
    narrow = torch.nn.Linear(1, 1, bias=False)
    narrow.weight = torch.nn.Parameter(head.weight[tokens], requires_grad=False)
    if head.bias is not None:
        narrow.bias = torch.nn.Parameter(head.bias[tokens], requires_grad=False)
    model.set_output_embeddings(narrow)
    try:
        yield
    finally:
        model.set_output_embeddings(head)
