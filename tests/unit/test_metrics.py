"""The metrics: what is the same scores 1, and what is worse scores less."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.metrics import (
    alignment_metrics,
    attention,
    cosine,
    gradient_norm,
    overlap,
)
from awareness_vllm.models.hf import load_model, states

pytestmark = pytest.mark.unit

IDS = [3, 5, 7, 9]


@pytest.fixture(scope="module")
def model(tiny_models: tuple[Path, Path]) -> torch.nn.Module:
    return load_model(tiny_models[1])


@pytest.fixture(scope="module")
def native(model: torch.nn.Module) -> AlignedMemory:
    ids = [2, *range(10, 30)]
    return AlignedMemory(ids, *states(model, ids))


def noisy(memory: AlignedMemory, noise: float) -> AlignedMemory:
    generator = torch.Generator().manual_seed(0)
    worse = copy.deepcopy(memory)
    for state in (*worse.keys, *worse.values):
        state += noise * state.std() * torch.randn(state.shape, generator=generator)
    return worse


def test_cosine_is_that_of_the_tokens_after_the_sink(native: AlignedMemory) -> None:
    torch.testing.assert_close(cosine(native, native, 1), torch.ones(2))
    spoilt = copy.deepcopy(native)
    for state in (*spoilt.keys, *spoilt.values):
        state[0] = 7.0
    torch.testing.assert_close(cosine(spoilt, native, 1), torch.ones(2))
    # Independent noise of the states' own size leaves 1/√2 of the direction.
    worse = cosine(noisy(native, 1.0), native, 1)
    assert ((worse > 0.6) & (worse < 0.8)).all(), worse


def test_attention_is_a_distribution_and_overlaps_with_itself(
    model: torch.nn.Module, native: AlignedMemory
) -> None:
    result = attention(model, native, IDS)
    assert len(result) == 2
    assert result[0].shape == (3, len(IDS), len(native.ids) + len(IDS))
    torch.testing.assert_close(result[0].sum(-1), torch.ones(3, len(IDS)))
    torch.testing.assert_close(overlap(result, result), torch.ones(2))
    assert model.config._attn_implementation == "sdpa"


def test_overlap_is_one_less_total_variation() -> None:
    ours, theirs = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.5, 0.0, 0.5]]])
    torch.testing.assert_close(overlap([ours], [theirs]), torch.tensor([0.5]))


def test_gradients_reach_every_state(model: torch.nn.Module, native: AlignedMemory) -> None:
    norm = gradient_norm(model, native, IDS)
    assert 0 < norm < float("inf")
    torch.testing.assert_close(gradient_norm(model, noisy(native, 0.0), IDS), norm)


@pytest.mark.parametrize("tail", [1, 5, 100])
def test_a_native_tail_gives_the_predictions_of_its_states(
    tiny_models: tuple[Path, Path], native: AlignedMemory, tail: int
) -> None:
    harness = EvalHarness(tiny_models[1], tiny_models[1], None)
    whole = harness.logprobs(native, IDS, 3)
    torch.testing.assert_close(harness.logprobs(native, IDS, 3, tail), whole, atol=1e-4, rtol=1e-4)
    worse = noisy(native, 1.0)
    far = (harness.logprobs(worse, IDS, 3) - whole).abs().max()
    # All but the first position are read natively: only that one's noise is left.
    assert (harness.logprobs(worse, IDS, 3, 100) - whole).abs().max() < far


def test_a_same_model_memory_is_perfect(tiny_models: tuple[Path, Path]) -> None:
    harness = EvalHarness(tiny_models[1], tiny_models[1], None)
    result = alignment_metrics(
        harness, [("the quick brown fox jumps over", IDS), ("a lazy dog and others", IDS)]
    )
    # Captured in float32 and stored in bfloat16.
    assert min(result.semantic_preservation) > 0.999
    assert min(result.attention_fidelity) > 0.99
    assert result.gradient_ratio == pytest.approx(1, abs=0.05)
    assert result.gradient_stability
    assert result.n == 2
