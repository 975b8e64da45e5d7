"""The arms: what is read at once is what is read alone, and controls cost what their plan costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.align.reread import passage_rows, reread
from awareness_vllm.evaluate.arms import Item, Memory, PlanShape, arms_of, conditions, score
from awareness_vllm.evaluate.bootstrap import margin, share
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.flops import Prefill, map_flop, plan_cost, plan_flop
from awareness_vllm.evaluate.reader import Reader, Text
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package
from awareness_vllm.passages.index import PassageIndex
from awareness_vllm.passages.quotes import quote
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.wmatrix.certificate import CONTROLS
from awareness_vllm.wmatrix.features import joined
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "The quick brown fox jumps over the lazy dog. Two dogs look on, and the other sleeps. " * 3
QUESTION = "Which dogs look on?"


@pytest.fixture(scope="module")
def harness(tiny_models: tuple[Path, Path], fitted: WMatrix) -> EvalHarness:
    return EvalHarness(*tiny_models, fitted)


@pytest.fixture(scope="module")
def packages(harness: EvalHarness) -> dict[str, Package]:
    return harness.packages([TEXT, TEXT[::-1]])


@pytest.fixture(scope="module")
def windowed(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a sliding window of 6 tokens in one of its two layers."""
    from tokenizers import Tokenizer, models
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("windowed")
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    Tokenizer(models.BPE({f"{i}": i for i in range(64)}, [])).save(str(folder / "tokenizer.json"))
    return folder


def test_texts_read_at_once_are_as_read_alone(windowed: Path) -> None:
    """Windows, states before the ids of many lengths, and ids of many lengths."""
    model, rng = load_model(windowed), np.random.default_rng(0)
    reader = Reader(model, geometry_of(windowed))
    ids = [rng.integers(2, 60, count).tolist() for count in (40, 25, 12, 40, 1)]
    whole = [joined(*states(model, text)) for text in ids]
    for rows, alone in zip(reader.states([Text((), text) for text in ids]), whole, strict=True):
        torch.testing.assert_close(rows, alone, atol=1e-4, rtol=1e-4)
    cuts = (10, 20, 3, 0, 0)
    texts = [
        Text((rows[: cut // 2], rows[cut // 2 : cut]), text[cut:])
        for rows, text, cut in zip(whole, ids, cuts, strict=True)
    ]
    for rows, alone, cut in zip(reader.states(texts), whole, cuts, strict=True):
        torch.testing.assert_close(rows, alone[cut:], atol=1e-4, rtol=1e-4)
    for i, logprobs in reader.logprobs(texts[:4], [4, 2, 4, 1]):
        count = (4, 2, 4, 1)[i]
        expected = model(torch.tensor([ids[i]])).logits[0, -count - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)


def test_a_passage_is_read_after_what_stands_before_it_alone(windowed: Path) -> None:
    """`align.reread`: states of the model itself are unchanged; of others just the passage is."""
    model, ids = load_model(windowed), np.random.default_rng(1).integers(2, 60, 40).tolist()
    native = AlignedMemory(ids, *states(model, ids))
    again = reread(model, native, [(3, 12), (20, 33)])
    for a, b in zip((*native.keys, *native.values), (*again.keys, *again.values), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    noisy = AlignedMemory(ids, [k + torch.randn_like(k) for k in native.keys], native.values)
    mended = reread(model, noisy, [(20, 33), (3, 12)])
    one = reread(model, noisy, [(20, 33)])
    for before, after, alone in zip(noisy.keys, mended.keys, one.keys, strict=True):
        changed = (before != after).flatten(1).any(1)
        assert changed.nonzero()[:, 0].tolist() == [*range(3, 12), *range(20, 33)]
        # Whatever else is re-read, a passage's rows are the same: they can be kept.
        assert torch.equal(after[20:33], alone[20:33])
    keys, values = passage_rows(model, noisy, (20, 33))
    assert all(torch.equal(key, mended.keys[i][20:33]) for i, key in enumerate(keys))
    assert values[0].shape == (13, 1, 8)
    assert reread(model, noisy, []) is noisy


def test_every_arm_is_what_it_is_by_itself(
    harness: EvalHarness, packages: dict[str, Package]
) -> None:
    package, ids, shape = packages[TEXT], [5, 7, 9, 11], PlanShape(6, 24)
    item = Item(package, ids, 3, QUESTION, packages[TEXT[::-1]], asks=True)
    found = conditions(harness, item, [PlanShape(shape.tail), shape])
    memory = harness.memory(package)
    vectors = word_vectors(harness.target)
    index = PassageIndex.of(TEXT, _spans(harness), harness.sink(), vectors=vectors)
    quoted = quote([TEXT[slice(*index.characters(s))] for s in index.choose(QUESTION, 24)])
    quote_ids = tokenize(load_tokenizer(str(harness.target)), quoted).ids
    end = len(memory.ids) - shape.tail
    spans = [(b, min(e, end)) for b, e in index.choose(QUESTION, 24) if b < end]
    assert spans
    tail = PlanShape(shape.tail)
    expected = {
        tail.condition(): harness.logprobs(memory, ids, 3, shape.tail),
        shape.condition("quoted"): harness.logprobs(memory, [*quote_ids, *ids], 3, shape.tail),
        "native": harness.logprobs(harness.native(memory.ids), ids, 3),
        "memory": harness.logprobs(memory, ids, 3),
        "tokens_only": harness.logprobs(harness.memory(package, masked=True), ids, 3),
        "wrong_memory": harness.logprobs(harness.memory(packages[TEXT[::-1]]), ids, 3),
        "none": harness.logprobs(harness.native(memory.ids[: harness.sink()]), ids, 3),
        shape.condition(): harness.logprobs(
            reread(harness.target_model, memory, spans), ids, 3, shape.tail
        ),
    }
    for name, logprobs in expected.items():
        torch.testing.assert_close(found[name], logprobs, atol=2e-3, rtol=1e-3)
    assert quote_ids
    assert found.keys() == {*expected, *(s.condition("tokens_only") for s in (tail, shape))}


def _spans(harness: EvalHarness) -> np.ndarray:
    return tokenize(load_tokenizer(str(harness.target)), TEXT).spans


@pytest.mark.parametrize("asks", [False, True])
def test_controls_read_no_more_than_their_plan_costs(
    harness: EvalHarness, packages: dict[str, Package], asks: bool
) -> None:
    assert harness.wmatrix is not None
    shapes = [PlanShape(t, r) for t in (0, 16) for r in (0, 24)]
    item = Item(packages[TEXT], [5, 7, 9], 2, QUESTION, asks=asks)
    (arms,) = arms_of(harness, [item], shapes, CONTROLS)
    sink, context = harness.sink(), harness.ids(TEXT)
    whole = arms["native"][0]
    for shape in shapes:
        flop = plan_flop(
            map_flop(harness.wmatrix), harness.prefill, len(context) - sink, *vars(shape).values(),
            sink,
        )  # fmt: skip
        count = {
            name: len(arms[shape.condition(name)][0]) - sink
            for name in CONTROLS
            if shape.condition(name) in arms
        }
        assert ("passages" in count) == bool(shape.reread)
        assert harness.prefill.flop(sink, sink + count["truncation"]) <= flop
        assert harness.prefill.flop(sink, sink + count["truncation"] + 1) > flop
        assert count["half"] == count["truncation"]
        assert count["quotes"] <= count["truncation"]
        # A truncation begins with the sink, and goes on where the text is cut.
        truncated = arms[shape.condition("truncation")][0]
        torch.testing.assert_close(truncated[:sink], whole[:sink], atol=1e-5, rtol=1e-4)
    names = [(i, name) for i, name, _ in score(harness, [item] * 2, [arms] * 2)]
    assert names[:2] == [(0, "native"), (1, "native")]
    assert len(names) == len(set(names)) == 2 * len(arms)


@given(budget=st.integers(0, 60), name=st.sampled_from(CONTROLS), reread=st.integers(0, 40))
def test_a_control_is_an_ordered_part_of_the_text(budget: int, name: str, reread: int) -> None:
    text = "".join(f"Item {i} is here. Nothing else. " for i in range(9))
    ends = np.arange(1, len(text) + 1)
    index = PassageIndex.of(text, np.stack((ends - 1, ends), 1), 2)
    ids = list(range(len(text) + 2))
    memory = Memory(ids, 2, "Which item is item 3?", index, {})
    read = memory.control(name, budget, reread)
    assert read == sorted(set(read))
    assert not {0, 1} & set(read)
    assert len(read) <= budget
    if name in ("truncation", "half"):
        assert len(read) == min(budget, len(text))
    if name == "truncation" and budget:
        assert read[-1] == ids[-1]


PREFILL = Prefill(1000.0, 10.0, (8, None))


@given(begin=st.integers(0, 40), first=st.integers(0, 30), second=st.integers(0, 30))
def test_reading_in_parts_costs_what_reading_at_once_costs(
    begin: int, first: int, second: int
) -> None:
    middle, end = begin + first, begin + first + second
    parts = PREFILL.flop(begin, middle) + PREFILL.flop(middle, end)
    assert PREFILL.flop(begin, end) == parts
    seen = sum(min(i + 1, 8) + i + 1 for i in range(begin, end))
    assert PREFILL.flop(begin, end) == 1000 * (end - begin) + 10 * seen
    affordable = PREFILL.affordable(parts, begin, 100)
    assert affordable == (end - begin if end > begin else 0)


@given(tokens=st.integers(100, 500), tail=st.integers(0, 40), reread=st.integers(0, 40))
def test_more_natively_costs_more(tokens: int, tail: int, reread: int) -> None:
    cost = plan_cost(100.0, PREFILL, tokens, tail, reread)
    assert cost > 100.0 / 1000 / 20
    assert cost < plan_cost(100.0, PREFILL, tokens, tail, reread + 1)
    assert cost < plan_cost(100.0, PREFILL, tokens, tail + 1, reread)
    assert plan_cost(0.0, PREFILL, tokens, tokens) == pytest.approx(1)


def test_linear_operations_are_two_a_weight(tiny_models: tuple[Path, Path]) -> None:
    model = load_model(tiny_models[1])
    prefill = Prefill.of(model, geometry_of(tiny_models[1]))
    weights = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    assert prefill.linear == pytest.approx(2 * weights)
    assert prefill.attention == 4 * 24
    assert prefill.windows == (None, None)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=2, max_size=30))
def test_a_margin_is_over_the_best_control(rows: list[tuple[float, ...]]) -> None:
    plan, one, other, possible = (np.array(column) for column in zip(*rows, strict=True))
    possible = possible + 0.5
    both, first = (margin(plan, c, possible) for c in ([one, other], [one]))
    expected = share(plan, possible)["mean"] - max(
        share(one, possible)["mean"], share(other, possible)["mean"]
    )
    assert both["mean"] == pytest.approx(expected)
    assert both["ci_low"] <= both["mean"] <= both["ci_high"]
    assert both["ci_low"] <= first["ci_low"] + 1e-12
