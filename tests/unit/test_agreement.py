"""The agreement of states with the target's own: genuine ones have it, random ones do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awareness_vllm.align.agreement import (
    COPY,
    MIN_TOKENS,
    agreement,
    check_agreement,
    least_agreement,
)
from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


def keys(seed: int, tokens: int = 40, offset: float = 10.0) -> list[Tensor]:
    """Keys of three layers [T, H, D] far off zero, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    return [offset + torch.randn(tokens, 2, 16, generator=generator) for _ in range(3)]


def test_another_engines_rounding_agrees_and_other_states_do_not() -> None:
    own = keys(0)
    rounded = [(key + 0.02 * torch.randn_like(key)).bfloat16() for key in own]
    assert agreement(rounded, own) > 0.99
    check_agreement("mem", rounded, own, COPY)
    shuffled = [key[torch.randperm(len(key))] for key in own]
    for other in (keys(1), shuffled, [torch.zeros_like(key) for key in own]):
        # Their common mean, which any text's keys share, is no agreement.
        assert abs(agreement(other, own)) < 0.3
        with pytest.raises(PackageCorrupt, match="mem_x"):
            check_agreement("mem_x", other, own, COPY)


def test_too_few_tokens_say_nothing() -> None:
    few = MIN_TOKENS - 1
    check_agreement("mem", keys(1, few), keys(0, few), COPY)
    with pytest.raises(PackageCorrupt):
        check_agreement("mem", keys(1, MIN_TOKENS), keys(0, MIN_TOKENS), COPY)


def test_a_map_owes_a_share_of_what_it_reached_on_held_out_texts(wmatrix: WMatrix) -> None:
    assert least_agreement(None) == COPY
    with_r2 = wmatrix.manifest.model_copy(update={"r2": {"keys": 0.64, "values": 0.1}})
    assert least_agreement(with_r2) == pytest.approx(0.45 * 0.8)
    for r2 in ({}, {"keys": -3.0}):
        assert least_agreement(wmatrix.manifest.model_copy(update={"r2": r2})) == 0
