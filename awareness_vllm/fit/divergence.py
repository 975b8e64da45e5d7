"""The divergence that a calibration lowers, over whole vocabularies without their intermediates.

Over 262,000 tokens each float32 intermediate of a step would take gigabytes, and each of another
size at every step. The gradient is as simple as the value, so both are made at once, a few rows at
a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Predictions at once: a quarter of a gigabyte in float32."""
UNLIKELY = -1e30
"""The logit of a token that is left out."""


def weighted_divergence(
    logits: Tensor, native: Tensor, weights: Tensor, taken: Tensor | None = None
) -> Tensor:
    """The KL divergences of predictions from native ones, in nats, summed by `weights` [M];
    differentiable in the logits.

    Args:
        logits, native: [M, V].
        taken: [M, V] bool, the tokens that count for each prediction; all by default.
    """
    total: Tensor = _Divergence.apply(logits, native, weights, taken)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, native: Tensor, weights: Tensor, taken: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(logits), ROWS):
            own = slice(begin, begin + ROWS)
            pair = [logits[own].float(), native[own].float()]
            if taken is not None:
                pair = [x.masked_fill(~taken[own], UNLIKELY) for x in pair]
            predicted, expected = (x.log_softmax(-1) for x in pair)
            shares = expected.exp()
            total += weights[own] @ (shares * (expected - predicted)).sum(-1)
            if gradient is not None:
                gradient[own] = (predicted.exp() - shares) * weights[own, None]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None
