"""Retention: its exact value, and an interval that contains it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import cut_tail
from awareness_vllm.evaluate.evaluate import CHARACTERS_PER_TOKEN, distance, join_documents
from awareness_vllm.models.tokens import tokenize

pytestmark = pytest.mark.unit

NATIVE = np.array([2.0, 3.0, 2.5, 1.0, 2.0, 3.5])
NONE = NATIVE + np.array([1.0, 2.0, 0.5, 3.0, 1.5, 1.0])
GAINED = np.array([0.9, 1.5, 0.5, 2.4, 0.6, 0.8])


def test_the_exact_value() -> None:
    # 6.7 of 9.0 nats, not the mean of the documents' own shares.
    assert retention(NATIVE, NONE - GAINED, NONE)["mean"] == pytest.approx(6.7 / 9.0)


def test_the_interval_contains_the_mean_and_has_width() -> None:
    result = retention(NATIVE, NONE - GAINED, NONE)
    assert result["ci_low"] < result["mean"] < result["ci_high"]
    assert result["ci_high"] - result["ci_low"] < 0.5


def test_native_is_one_and_none_is_zero_without_doubt() -> None:
    assert set(retention(NATIVE, NATIVE, NONE).values()) == {1.0}
    assert set(retention(NATIVE, NONE, NONE).values()) == {0.0}


def test_better_memories_retain_more_and_harmful_ones_less_than_nothing() -> None:
    means = [retention(NATIVE, NONE - share * GAINED, NONE)["mean"] for share in (-1, 0.5, 1, 2)]
    assert means == sorted(means)
    assert means[0] < 0 < means[1]


def test_the_same_figures_give_the_same_interval() -> None:
    memory = NONE - GAINED
    assert retention(NATIVE, memory, NONE) == retention(NATIVE, memory, NONE)


def test_the_order_of_documents_does_not_change_the_mean() -> None:
    order = np.array([3, 1, 5, 0, 2, 4])
    one = retention(NATIVE, NONE - GAINED, NONE)
    other = retention(NATIVE[order], (NONE - GAINED)[order], NONE[order])
    assert other["mean"] == pytest.approx(one["mean"])
    # Documents are drawn whole: the interval is one over them, whatever their order.
    assert other["ci_low"] == pytest.approx(one["ci_low"], abs=0.03)
    assert other["ci_high"] == pytest.approx(one["ci_high"], abs=0.03)


@given(count=st.integers(0, 12), tail=st.integers(0, 14))
def test_a_memory_and_its_tail_are_the_memory(count: int, tail: int) -> None:
    state = torch.arange(count, dtype=torch.float32)[:, None, None]
    memory = AlignedMemory(list(range(count)), [state], [state + 0.5])
    rest, ids = cut_tail(memory, tail)
    assert rest.ids + ids == memory.ids
    assert len(ids) == min(tail, max(0, count - 1))
    assert torch.equal(rest.keys[0], state[: len(rest.ids)])
    assert torch.equal(rest.values[0], state[: len(rest.ids)] + 0.5)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text("xy ", max_size=30))), st.integers(1, 9))
def test_joined_documents_hold_every_text_once(parts: list[tuple[str, str]], tokens: int) -> None:
    documents = [Document(f"{kind}/{i}", text) for i, (kind, text) in enumerate(parts)]
    long = join_documents(documents, tokens)
    for kind in "ab":
        texts = [d.text for d in documents if d.name.startswith(kind)]
        assert "\n\n".join(d.text for d in long if d.name.startswith(kind)) == "\n\n".join(texts)
        # Only the last of a kind may be too short.
        for document in [d for d in long if d.name.startswith(kind)][:-1]:
            assert len(document.text) >= CHARACTERS_PER_TOKEN * tokens
    assert join_documents(long, tokens) == long


def test_distance_is_from_the_last_mention_to_the_end(byte_level_tokenizer: Tokenizer) -> None:
    rest = " and more words"
    count = len(tokenize(byte_level_tokenizer, rest).ids)
    assert distance(byte_level_tokenizer, f"Rome, or Rome{rest}", " Rome") == count
    assert distance(byte_level_tokenizer, "it is Rome", " Rome") == 0
    assert distance(byte_level_tokenizer, "no such place", " Rome") == 0
