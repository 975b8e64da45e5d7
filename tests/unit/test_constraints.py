"""Constraints of the attribution: features that they let a head read, and regressions on these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution.constrained import Regression
from attribution.constraints import at_depth, at_place, blocks, reading
from attribution.shares import HEADS, LAYERS, NORMS, POSITIONS, RANK, Lifted, subset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awareness_vllm.fit.solve import RIDGES, reduced_rank_ridge
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.wmatrix.heads import Head

# Tests of a benchmark's script.
pytestmark = [pytest.mark.unit, pytest.mark.nightly]

NAIVE: Lifted = frozenset()
FREE = 3
"""Features of the tiny regressions that are the target's own."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(*layers: tuple[int, int]) -> Geometry:
    """A model whose layers have so many heads of so many dims."""
    return Geometry(
        name="tiny",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=8,
        vocab_size=10,
        max_positions=64,
        layers=tuple(
            LayerGeometry(heads=h, head_dim=d, positions=Positions(scheme="none"))
            for h, d in layers
        ),
        weights="w" * 64,
        tokenizer="t" * 64,
    )


SOURCE = model((4, 2), (4, 2), (4, 2))
TARGET = model((2, 3), (2, 3))
READ = (0, 2)
WIDTH = SOURCE.width_of(READ)
"""Keys of layers 0 and 2, 8 dims each, then their values."""


def regression(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Regression, Statistics]:
    """The regression of rows, the last fifth held out, and the same sums once more."""
    split = len(x) * 4 // 5
    result = []
    for _ in range(2):
        sums = Statistics.start(x[:split], y[:split])
        sums.add(x[:split], y[:split])
        result.append(sums)
    weight = torch.ones(y.shape[1]) if weight is None else weight
    return Regression.of(result[0], (x[split:], y[split:]), weight), result[1]


def standardised(sums: Statistics, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were summed, centred and divided by their scales, in float64."""
    split = len(x) * 4 // 5
    rows = []
    for values, scale in ((x, sums.x_std), (y, sums.y_std)):
        some = values[:split].double()
        rows.append((some - some.mean(0)) / scale)
    return rows[0], rows[1]


def ridge_fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The fitted values of the ordinary ridge, on its own rows."""
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return x @ torch.linalg.solve(gram, x.T @ y / len(x))


@pytest.mark.parametrize(
    ("read", "source", "target", "result"),
    [
        (range(4), 4, 4, [0, 1, 2, 3]),
        ([1, 3, 5], 6, 3, [1, 3, 5]),
        ([0, 2], 3, 5, [0, 0, 0, 2, 2]),
        ([3], 4, 2, [3, 3]),
    ],
    ids=["same depth", "every other read", "deeper target", "one read"],
)
def test_a_layer_reads_the_nearest_in_depth(
    read: list[int], source: int, target: int, result: list[int]
) -> None:
    ends = model(*[(1, 2)] * source), model(*[(1, 2)] * target)
    assert [at_depth(ends[0], read, ends[1], layer) for layer in range(target)] == result


def test_a_head_reads_the_heads_at_its_relative_place() -> None:
    source = model((4, 2), (3, 2))
    target = model((2, 3))
    assert at_place(source, 0, target, Head("key", 0, 1)) == (
        (Head("key", 0, 2), 0.5),
        (Head("key", 0, 3), 0.5),
    )
    result = at_place(source, 1, target, Head("value", 0, 0))
    assert [head for head, _ in result] == [Head("value", 1, 0), Head("value", 1, 1)]
    assert [share for _, share in result] == pytest.approx([2 / 3, 1 / 3])


def test_a_lifted_constraint_lets_more_be_read() -> None:
    def heads_of(lifted: Lifted) -> set[Head]:
        result = reading(SOURCE, READ, TARGET, Head("value", 1, 0), lifted)
        return {head for merged in result for head, _ in merged}

    place = {Head("value", 2, 0), Head("value", 2, 1)}
    assert heads_of(NAIVE) == place
    assert heads_of(frozenset({LAYERS})) == place | {Head("value", 0, i) for i in range(2)}
    whole = {Head(part, layer, i) for part in ("key", "value") for layer in READ for i in range(4)}
    assert heads_of(frozenset({HEADS})) == {head for head in whole if head.layer == 2}
    assert heads_of(frozenset({HEADS, LAYERS})) == whole
    assert heads_of(frozenset({RANK, POSITIONS, NORMS})) == place


@given(mask=st.integers(0, 31), heads=st.tuples(*[st.integers(1, 5)] * 2), seed=st.integers(0, 9))
def test_blocks_hold_each_target_once_and_merge_orthonormally(
    mask: int, heads: tuple[int, int], seed: int
) -> None:
    source, target = model((heads[0], 2), (3, 4)), model((heads[1], 3), (2, 2))
    scale = random(source.width + FREE, seed=seed).abs() + 0.1
    result = blocks(source, (0, 1), target, scale, subset(mask))
    columns = torch.cat([block.columns for block in result])
    assert columns.sort().values.tolist() == [*range(target.width)]
    for block in result:
        merge = block.merge.to_dense()
        torch.testing.assert_close(merge.T @ merge, torch.eye(merge.shape[1]))
        # The target's own features are read as they are.
        torch.testing.assert_close(merge[-FREE:, -FREE:], torch.eye(FREE))


X = random(500, WIDTH + FREE) * torch.linspace(0.5, 3, WIDTH + FREE)
Y = X @ random(WIDTH + FREE, TARGET.width, seed=1) + 3 + random(500, TARGET.width, seed=2)


def test_without_constraints_it_is_the_plain_ridge() -> None:
    result, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    every = blocks(SOURCE, READ, TARGET, sums.x_std, frozenset({HEADS, LAYERS}))
    assert len(every) == 1
    fitted = x.float() @ result.solution(every, 0.02)
    torch.testing.assert_close(fitted, ridge_fit(x, y, 0.02).float(), atol=1e-2, rtol=0)


def test_with_constraints_it_is_the_ridge_on_the_features_that_remain() -> None:
    result, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    raw, free = x * sums.x_std, x[:, WIDTH:]
    for lifted in (frozenset({LAYERS}), NAIVE):
        bound = blocks(SOURCE, READ, TARGET, sums.x_std, lifted)
        fitted = x.float() @ result.solution(bound, 0.02)
        for part_, layer, head in np.ndindex(2, 2, 2):
            merged = []
            # Target layer 0 stands at source layer 0's depth, 1 at 2's: places 0 and 1 of READ.
            for place in (0, 1) if lifted else (layer,):
                begin = part_ * 16 + place * 8 + head * 4
                pair = [slice(begin, begin + 2), slice(begin + 2, begin + 4)]
                spread = torch.stack([sums.x_std[p] for p in pair]).square().sum(0).sqrt()
                merged.append(sum(raw[:, p] for p in pair) / spread)
            columns = slice(
                part_ * 12 + layer * 6 + head * 3, part_ * 12 + layer * 6 + head * 3 + 3
            )
            direct = ridge_fit(torch.cat([*merged, free], dim=1), y[:, columns], 0.02)
            torch.testing.assert_close(fitted[:, columns], direct.float(), atol=1e-2, rtol=0)


def test_dense_from_one_layer_it_is_the_ridge_on_that_layer() -> None:
    result, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    bound = blocks(SOURCE, READ, TARGET, sums.x_std, frozenset({HEADS}))
    fitted = x.float() @ result.solution(bound, 0.02)
    for layer in range(2):
        source, target = (
            [*range(layer * n, layer * n + n), *range(2 * n + layer * n, 3 * n + layer * n)]
            for n in (8, 6)
        )
        direct = ridge_fit(torch.cat((x[:, source], x[:, WIDTH:]), dim=1), y[:, target], 0.02)
        torch.testing.assert_close(fitted[:, target], direct.float(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_the_reduced_map_is_that_of_reduced_rank_ridge(rank: int) -> None:
    weight = random(TARGET.width, seed=3).abs() + 0.1
    result, sums = regression(X, Y, weight)
    every = blocks(SOURCE, READ, TARGET, sums.x_std, frozenset({HEADS, LAYERS}))
    whole = result.solve(every, rank)
    x_mean, x_std = sums.x_mean.clone(), sums.x_std.clone()
    encode, decode, bias = reduced_rank_ridge(sums, rank, whole.ridge, weight)
    direct = (X - x_mean) / x_std @ encode @ decode + bias
    states = whole.states(X, torch.zeros(len(X), dtype=torch.bool), WIDTH)
    torch.testing.assert_close(whole.reduced(states), direct, atol=2e-2, rtol=0)
    if rank >= TARGET.width:
        torch.testing.assert_close(whole.reduced(states), states, atol=1e-3, rtol=0)


def test_masked_states_count_as_the_mean() -> None:
    result, sums = regression(X, Y)
    every = blocks(SOURCE, READ, TARGET, sums.x_std, frozenset({HEADS, LAYERS}))
    whole = result.solve(every, 4)
    masked = torch.tensor([False, True])
    mean = X[:2].clone()
    mean[1, :WIDTH] = result.scaling.x_mean[:WIDTH]
    nothing = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(
        whole.states(X[:2], masked, WIDTH), whole.states(mean, nothing, WIDTH)
    )


def test_the_ridge_is_chosen_on_held_out_rows() -> None:
    few = X[:60]
    noise, _ = regression(few, random(60, TARGET.width, seed=5))
    plain, _ = regression(X, X @ random(WIDTH + FREE, TARGET.width, seed=1))
    for result, ridge in ((noise, RIDGES[-1]), (plain, RIDGES[0])):
        bound = blocks(SOURCE, READ, TARGET, result.scaling.x_std, frozenset({HEADS, LAYERS}))
        assert result.choose_ridge(bound) == ridge


def r2_by_part(truth: Tensor, lifted: Lifted) -> float:
    """The share of the variance of held-out rows that the map explains at full rank."""
    result, sums = regression(X, truth)
    whole = result.solve(blocks(SOURCE, READ, TARGET, sums.x_std, lifted), 4)
    rows = slice(len(X) * 4 // 5, None)
    states = whole.states(X[rows], torch.zeros(len(X[rows]), dtype=torch.bool), WIDTH)
    return 1 - ((truth[rows] - states).var() / truth[rows].var()).item()


def test_heads_cost_nothing_where_the_truth_is_head_by_head() -> None:
    # Each target head is the mean of its two source heads at its layer's place, projected.
    halves = X[:, :WIDTH].view(-1, 2, 2, 2, 2, 2).mean(4)
    by_head = torch.einsum("nplhd,plhde->nplhe", halves, random(2, 2, 2, 2, 3, seed=6)).flatten(1)
    by_head = by_head + 0.1 * random(*by_head.shape, seed=8)
    dense = X[:, :WIDTH] @ random(WIDTH, TARGET.width, seed=7)
    for lifted in (NAIVE, frozenset({HEADS}), frozenset({LAYERS}), frozenset({HEADS, LAYERS})):
        assert r2_by_part(by_head, lifted) > 0.99
    assert r2_by_part(dense, frozenset({HEADS, LAYERS})) > 0.99
    assert r2_by_part(dense, frozenset({LAYERS})) < 0.7
    assert r2_by_part(dense, frozenset({HEADS})) < 0.7
