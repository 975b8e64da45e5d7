"""The narrowed head of calibration: the same logits, for fewer tokens."""

from __future__ import annotations

import pytest
import torch

from awareness_vllm.fit.layers import spread_layers
from awareness_vllm.fit.memories import narrowed
from awareness_vllm.models.hf import last_logits

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A head with a step of its own behind it: Gemma 2 caps its logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    return Gemma2ForCausalLM(config).eval()


def test_the_narrowed_head_gives_the_same_logits(model: torch.nn.Module) -> None:
    ids, tokens = [3, 1, 4, 1, 5], torch.tensor([7, 0, 49])
    whole = last_logits(model, ids, 2)
    with narrowed(model, tokens):
        narrow = last_logits(model, ids, 2)
    torch.testing.assert_close(narrow, whole[:, tokens])
    assert torch.equal(last_logits(model, ids, 2), whole)


def test_the_narrowed_head_gives_some_rows_of_a_batch(model: torch.nn.Module) -> None:
    ids, rows = torch.tensor([[3, 1, 4], [1, 5, 9]]), torch.tensor([5, 0, 1])
    whole = model(ids).logits.flatten(0, 1)
    with narrowed(model, None, rows):
        torch.testing.assert_close(model(ids).logits[0], whole[rows])


def test_the_head_comes_back_after_an_error(model: torch.nn.Module) -> None:
    head = model.get_output_embeddings()
    with pytest.raises(ZeroDivisionError), narrowed(model, torch.tensor([1])):
        raise ZeroDivisionError
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize(
    ("count", "total", "layers"),
    [
        (None, 30, tuple(range(1, 30, 2))),
        (None, 1, (0,)),
        (30, 30, tuple(range(30))),
        (99, 3, (0, 1, 2)),
        (1, 18, (17,)),
        (4, 10, (1, 4, 6, 9)),
    ],
)
def test_layers_are_evenly_spread(count: int | None, total: int, layers: tuple[int, ...]) -> None:
    assert spread_layers(count, total) == layers
