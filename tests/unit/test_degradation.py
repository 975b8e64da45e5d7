"""Attribution of a loss: a constraint binds what it says, and the shares add up."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from attribution import attribution
from attribution.attribution import as_read, attribute, conditions, placed, said, with_norms
from attribution.constrained import ConstrainedMap, Regression
from attribution.constraints import at_depth, at_place, blocks, reading
from attribution.shares import (
    HEADS,
    LAYERS,
    NORMS,
    POSITIONS,
    RANK,
    SOURCES,
    WMATRIX,
    Lifted,
    mask,
    part,
    shapley,
    subset,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.compatibility.degradation import Degradation, Lost, Measures, beside, load_for
from awareness_vllm.compatibility.report import REMAINDER
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.conditions import EvalHarness, kl_divergence
from awareness_vllm.fit import gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.solve import RIDGES, reduced_rank_ridge
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import Head
from awareness_vllm.wmatrix.registry import WMatrixEntry

pytestmark = pytest.mark.unit

PUBLISHED = {
    "dimensional projection": 0.30,
    "head redistribution": 0.25,
    "positional re-encoding": 0.20,
    "layer depth mismatch": 0.15,
    "activation mismatch": 0.10,
}
NAIVE: Lifted = frozenset()
ALL = frozenset(SOURCES)
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
    """Of rows, the last fifth of them held out; and the same sums once more."""
    split = len(x) * 4 // 5
    found = []
    for _ in range(2):
        sums = Statistics.start(x[:split], y[:split])
        sums.add(x[:split], y[:split])
        found.append(sums)
    weight = torch.ones(y.shape[1]) if weight is None else weight
    return Regression.of(found[0], (x[split:], y[split:]), weight), found[1]


def standardised(sums: Statistics, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were summed, centred and divided by their scales, in float64."""
    split = len(x) * 4 // 5
    rows = []
    for values, scale in ((x, sums.x_scale), (y, sums.y_scale)):
        some = values[:split].double()
        rows.append((some - some.mean(0)) / scale)
    return rows[0], rows[1]


def ridge_fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """What the ordinary ridge gives for the rows that it was fitted on."""
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return x @ torch.linalg.solve(gram, x.T @ y / len(x))


def test_the_sources_are_the_published_ones() -> None:
    assert SOURCES == PUBLISHED


def test_every_subset_has_its_number() -> None:
    assert [mask(subset(i)) for i in range(32)] == [*range(32)]
    assert subset(0) == NAIVE
    assert subset(31) == ALL
    assert {RANK, NORMS} == ALL - WMATRIX


@pytest.mark.parametrize(
    ("read", "source", "target", "found"),
    [
        (range(4), 4, 4, [0, 1, 2, 3]),
        ([1, 3, 5], 6, 3, [1, 3, 5]),
        ([0, 2], 3, 5, [0, 0, 0, 2, 2]),
        ([3], 4, 2, [3, 3]),
    ],
    ids=["same depth", "every other read", "deeper target", "one read"],
)
def test_a_layer_reads_the_nearest_in_depth(
    read: list[int], source: int, target: int, found: list[int]
) -> None:
    ends = model(*[(1, 2)] * source), model(*[(1, 2)] * target)
    assert [at_depth(ends[0], read, ends[1], layer) for layer in range(target)] == found


def test_a_head_reads_what_stands_at_its_place() -> None:
    source = model((4, 2), (3, 2))
    target = model((2, 3))
    assert at_place(source, 0, target, Head("key", 0, 1)) == (
        (Head("key", 0, 2), 0.5),
        (Head("key", 0, 3), 0.5),
    )
    found = at_place(source, 1, target, Head("value", 0, 0))
    assert [head for head, _ in found] == [Head("value", 1, 0), Head("value", 1, 1)]
    assert [share for _, share in found] == pytest.approx([2 / 3, 1 / 3])


def test_a_lifted_constraint_lets_more_be_read() -> None:
    def heads_of(lifted: Lifted) -> set[Head]:
        found = reading(SOURCE, READ, TARGET, Head("value", 1, 0), lifted)
        return {head for merged in found for head, _ in merged}

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
    found = blocks(source, (0, 1), target, scale, subset(mask))
    columns = torch.cat([block.columns for block in found])
    assert columns.sort().values.tolist() == [*range(target.width)]
    for block in found:
        merge = block.merge.to_dense()
        torch.testing.assert_close(merge.T @ merge, torch.eye(merge.shape[1]))
        # The target's own features are read as they are.
        torch.testing.assert_close(merge[-FREE:, -FREE:], torch.eye(FREE))


X = random(500, WIDTH + FREE) * torch.linspace(0.5, 3, WIDTH + FREE)
Y = X @ random(WIDTH + FREE, TARGET.width, seed=1) + 3 + random(500, TARGET.width, seed=2)


def test_without_constraints_it_is_the_plain_ridge() -> None:
    found, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    every = blocks(SOURCE, READ, TARGET, sums.x_scale, frozenset({HEADS, LAYERS}))
    assert len(every) == 1
    fitted = x.float() @ found.solution(every, 0.02)
    torch.testing.assert_close(fitted, ridge_fit(x, y, 0.02).float(), atol=1e-2, rtol=0)


def test_with_constraints_it_is_the_ridge_on_what_may_be_read() -> None:
    found, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    raw, free = x * sums.x_scale, x[:, WIDTH:]
    for lifted in (frozenset({LAYERS}), NAIVE):
        bound = blocks(SOURCE, READ, TARGET, sums.x_scale, lifted)
        fitted = x.float() @ found.solution(bound, 0.02)
        for part_, layer, head in np.ndindex(2, 2, 2):
            merged = []
            # Target layer 0 stands at source layer 0's depth, 1 at 2's: places 0 and 1 of READ.
            for place in (0, 1) if lifted else (layer,):
                begin = part_ * 16 + place * 8 + head * 4
                pair = [slice(begin, begin + 2), slice(begin + 2, begin + 4)]
                spread = torch.stack([sums.x_scale[p] for p in pair]).square().sum(0).sqrt()
                merged.append(sum(raw[:, p] for p in pair) / spread)
            columns = slice(
                part_ * 12 + layer * 6 + head * 3, part_ * 12 + layer * 6 + head * 3 + 3
            )
            direct = ridge_fit(torch.cat([*merged, free], dim=1), y[:, columns], 0.02)
            torch.testing.assert_close(fitted[:, columns], direct.float(), atol=1e-2, rtol=0)


def test_dense_from_one_layer_it_is_the_ridge_on_that_layer() -> None:
    found, sums = regression(X, Y)
    x, y = standardised(sums, X, Y)
    bound = blocks(SOURCE, READ, TARGET, sums.x_scale, frozenset({HEADS}))
    fitted = x.float() @ found.solution(bound, 0.02)
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
    found, sums = regression(X, Y, weight)
    every = blocks(SOURCE, READ, TARGET, sums.x_scale, frozenset({HEADS, LAYERS}))
    whole = found.solve(every, rank)
    x_mean, x_scale = sums.x_mean.clone(), sums.x_scale.clone()
    encode, decode, bias = reduced_rank_ridge(sums, rank, whole.ridge, weight)
    direct = (X - x_mean) / x_scale @ encode @ decode + bias
    states = whole.states(X, torch.zeros(len(X), dtype=torch.bool), WIDTH)
    torch.testing.assert_close(whole.reduced(states), direct, atol=2e-2, rtol=0)
    if rank >= TARGET.width:
        torch.testing.assert_close(whole.reduced(states), states, atol=1e-3, rtol=0)


def test_what_says_nothing_is_taken_for_the_mean() -> None:
    found, sums = regression(X, Y)
    every = blocks(SOURCE, READ, TARGET, sums.x_scale, frozenset({HEADS, LAYERS}))
    whole = found.solve(every, 4)
    masked = torch.tensor([False, True])
    mean = X[:2].clone()
    mean[1, :WIDTH] = found.scaling.x_mean[:WIDTH]
    nothing = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(
        whole.states(X[:2], masked, WIDTH), whole.states(mean, nothing, WIDTH)
    )


def test_the_ridge_is_chosen_on_held_out_rows() -> None:
    few = X[:60]
    noise, _ = regression(few, random(60, TARGET.width, seed=5))
    plain, _ = regression(X, X @ random(WIDTH + FREE, TARGET.width, seed=1))
    for found, ridge in ((noise, RIDGES[-1]), (plain, RIDGES[0])):
        bound = blocks(SOURCE, READ, TARGET, found.scaling.x_scale, frozenset({HEADS, LAYERS}))
        assert found.choose_ridge(bound) == ridge


def r2_by_part(truth: Tensor, lifted: Lifted) -> float:
    """The share of the variance of held-out rows that the map explains at full rank."""
    found, sums = regression(X, truth)
    whole = found.solve(blocks(SOURCE, READ, TARGET, sums.x_scale, lifted), 4)
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


@given(st.integers(1, 5).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 99))))
def test_what_is_taken_away_adds_up(drawn: tuple[int, int]) -> None:
    count, seed = drawn
    losses = np.random.default_rng(seed).normal(size=(2**count, 3))
    found = shapley(losses)
    np.testing.assert_allclose(found.sum(0) + losses[-1], losses[0])
    # Whoever changes nothing gets nothing, and who adds the same to all gets just that.
    with_one = np.concatenate((losses + 2, losses))
    np.testing.assert_allclose(shapley(with_one), [*found, [2, 2, 2]])


def test_two_that_only_work_together_share() -> None:
    found = shapley(np.array([[4.0], [4.0], [4.0], [1.0]]))
    np.testing.assert_allclose(found, [[1.5], [1.5]])


def losses_of(cost: dict[str, float], rest: float, n: int = 2) -> np.ndarray:
    """Losses [32, n] that add up, with a little more in each text."""
    bound = [rest + sum(c for name, c in cost.items() if name not in subset(i)) for i in range(32)]
    return np.array(bound)[:, None] * np.arange(1, n + 1)


COSTS = {RANK: -0.2, HEADS: 0.6, POSITIONS: 0.9, LAYERS: 0.2, NORMS: 0.1}


def test_shares_are_of_the_naive_loss_with_their_signs() -> None:
    found = part(losses_of(COSTS, 0.4), np.array([0.1, 0.3]))
    assert found.n == 2
    assert found.loss.mean == pytest.approx(3.0)
    assert {name: i.mean for name, i in found.recovered.items()} == pytest.approx(
        {name: 1.5 * cost for name, cost in COSTS.items()}
    )
    assert found.remainder.mean == pytest.approx(0.6)
    shares = {share.source: share.share.mean for share in found.shares}
    assert shares == pytest.approx({**{n: c / 2 for n, c in COSTS.items()}, REMAINDER: 0.2})
    assert sum(shares.values()) == pytest.approx(1)
    assert [share.prior for share in found.shares] == [*PUBLISHED.values(), None]
    assert found.served.mean == pytest.approx(0.2)
    # With true positions the others share what is left of the loss.
    assert found.placed.mean == pytest.approx(3.0 - 1.35)
    placed = {share.source: share.share.mean for share in found.placed_shares}
    others = {name: cost / 1.1 for name, cost in COSTS.items() if name != POSITIONS}
    assert placed == pytest.approx({**others, REMAINDER: 0.4 / 1.1})
    # At the W-Matrix's structure: limited rank, its own norms, nothing else.
    assert found.uncalibrated.mean == pytest.approx(1.5 * (0.4 - 0.2 + 0.1))
    assert {name: i.mean for name, i in found.alone.items()} == pytest.approx(
        {name: 1.5 * cost for name, cost in COSTS.items()}
    )


def test_alone_is_at_the_structure_of_the_wmatrix() -> None:
    losses = np.zeros((32, 2))
    losses[mask(WMATRIX)] = 1
    losses[mask(WMATRIX | {RANK})] = 0.25
    losses[mask(WMATRIX - {HEADS})] = 5
    found = part(losses, np.zeros(2)).alone
    assert found[RANK].mean == pytest.approx(0.75)
    assert found[HEADS].mean == pytest.approx(4)
    assert found[LAYERS].mean == pytest.approx(-1)


def test_nothing_lost_has_no_shares() -> None:
    assert part(np.zeros((32, 2)), np.zeros(2)).shares == ()


def test_norms_are_given_and_directions_are_not(wmatrix: WMatrix) -> None:
    geometry = wmatrix.manifest.target
    states, truth = random(20, geometry.width), random(20, geometry.width, seed=1)
    before = states.clone()
    found = with_norms(geometry, states, truth)
    # Every head of this target is 4 wide.
    ours, theirs, mapped = (s.view(20, -1, 4) for s in (found, truth, states))
    torch.testing.assert_close(ours.norm(dim=2).mean(0), theirs.norm(dim=2).mean(0))
    cosines = torch.nn.functional.cosine_similarity(ours, mapped, dim=2)
    torch.testing.assert_close(cosines, torch.ones(20, 6))
    assert torch.equal(states, before)


CONFIG = FitConfig(
    layers=3, tokens=2000, rank=4, predecessors=1, calibration=0, held_out=0.0, ridge=0.02
)


@pytest.fixture(scope="module")
def fitted(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[WMatrix, Path]:
    """A map between the tiny models, with its file."""
    path = tmp_path_factory.mktemp("pair") / "tiny.wmatrix"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        wmatrix = fit(*tiny_models, anchors, CONFIG, progress=False)
    wmatrix.save(path)
    return wmatrix, path


@pytest.fixture
def maps(
    tiny_models: tuple[Path, Path],
    fitted: tuple[WMatrix, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> tuple[EvalHarness, Reader, dict[Lifted, ConstrainedMap]]:
    """The tiny models with the maps between them."""
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    wmatrix, _ = fitted
    reader = Reader(*tiny_models, wmatrix.manifest.predecessors)
    reader.choose(wmatrix.manifest.layers)
    work = attribution.Checkpoint(tmp_path / "work", "")
    documents = (anchors[1:], anchors[:1])
    found, rows = attribution.fitted(reader, documents, 4, 1500, work, progress=False)
    assert rows >= 1500
    return EvalHarness(*tiny_models, wmatrix), reader, found


def test_the_truth_loses_nothing_and_each_arm_something_else(
    maps: tuple[EvalHarness, Reader, dict[Lifted, ConstrainedMap]], anchors: list[Document]
) -> None:
    harness, reader, found = maps
    wmatrix = harness.wmatrix
    assert wmatrix is not None
    context, follow = anchors[0].text[:200], [7, 20, 30, 40, 50]
    text = as_read(harness, wmatrix, context)
    assert text.ids == harness.ids(context)
    native = said(harness, harness.native(text.ids), follow)
    given = said(harness, placed(wmatrix, text.ids, text.truth), follow)
    torch.testing.assert_close(given, native, atol=1e-5, rtol=0)
    memories = list(conditions(wmatrix, text, reader.read(context), found))
    keys = [torch.cat([k.flatten() for k in memory.keys]) for memory in memories]
    values = [torch.cat([v.flatten() for v in memory.values]) for memory in memories]
    for number in range(32):
        for name in SOURCES:
            other = mask(subset(number) ^ {name})
            assert not torch.equal(keys[number], keys[other]), name
            # Positions are the keys' alone.
            assert torch.equal(values[number], values[other]) == (name == POSITIONS)
    losses = attribution.losses(harness, wmatrix, reader, found, context, follow)
    assert losses.shape == (33, 2)
    kl = kl_divergence(native, said(harness, text.served, follow)).mean().item()
    assert losses[0, 1] == pytest.approx(kl, abs=1e-6)
    assert len(set(losses[1:, 1].tolist())) == 32


def test_keys_stand_where_the_source_counted_them(
    maps: tuple[EvalHarness, Reader, dict[Lifted, ConstrainedMap]], anchors: list[Document]
) -> None:
    harness, _, _ = maps
    assert harness.wmatrix is not None
    text = as_read(harness, harness.wmatrix, anchors[0].text[:200])
    sink = len(harness.wmatrix.manifest.sink)
    true = torch.arange(sink, len(text.ids))
    assert len(text.counted) == len(true)
    assert text.counted[0] == sink
    assert (text.counted.diff() >= 0).all()
    # These tokenizers cut differently.
    assert not torch.equal(text.counted, true)
    there, elsewhere = (
        placed(harness.wmatrix, text.ids, text.truth, positions)
        for positions in (true, text.counted)
    )
    default = placed(harness.wmatrix, text.ids, text.truth)
    for i, key in enumerate(default.keys):
        assert torch.equal(there.keys[i], key)
        same = (elsewhere.keys[i] == key).flatten(1).all(1)
        assert same[sink:].tolist() == (text.counted == true).tolist()


def test_a_pair_is_measured_kept_and_found_again(
    tiny_models: tuple[Path, Path],
    fitted: tuple[WMatrix, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    wmatrix, path = fitted
    read = []
    whole = attribution.fitted

    def seen(reader: Reader, *args: Any, **kwargs: Any) -> Any:
        read.append(reader.layers)
        return whole(reader, *args, **kwargs)

    monkeypatch.setattr(attribution, "fitted", seen)
    texts = [Document(f"{'ab'[i % 2]}/{i}", d.text) for i, d in enumerate(anchors)]
    found = attribute(
        path,
        *tiny_models,
        texts,
        anchors,
        contexts={40: 3, 20: 4},
        continuation=5,
        tokens=1500,
        folder=tmp_path / "work",
        progress=False,
    )
    assert read == [wmatrix.manifest.layers]
    assert not (tmp_path / "work").exists()
    assert list(found.contexts) == [20, 40]
    assert found.contexts[40].all.kl.n == 3
    lost = found.contexts[20]
    assert lost.all.nll.n == lost.all.kl.n == 4
    assert {kind: m.nll.n for kind, m in lost.kinds.items()} == {"a": 2, "b": 2}
    for measure in (lost.all.nll, lost.all.kl, lost.kinds["a"].kl):
        assert measure.recovered.keys() == measure.alone.keys() == PUBLISHED.keys()
        whole = sum(i.mean for i in measure.recovered.values()) + measure.remainder.mean
        assert measure.loss.mean == pytest.approx(whole)
    assert lost.all.kl.loss.mean > 0
    assert lost.all.kl.loss != lost.all.nll.loss
    assert found.anchor_tokens >= 1500
    assert found.rank == 4
    assert found.shares(10) == found.shares(20) == lost.all.nll.shares
    assert found.shares(21) == found.shares(99) == found.contexts[40].all.nll.shares
    assert found.shares(40, "kl") == found.contexts[40].all.kl.shares
    found.save(path)
    assert load_for(WMatrixEntry.read(path)) == found


def test_a_map_without_text_is_refused(
    tiny_models: tuple[Path, Path], fitted: tuple[WMatrix, Path], tmp_path: Path
) -> None:
    wmatrix, _ = fitted
    manifest = wmatrix.manifest
    features = manifest.source_width
    path = tmp_path / "gist.wmatrix"
    replace(
        wmatrix,
        manifest=manifest.model_copy(update={"predecessors": None}),
        mean=wmatrix.mean[:features],
        scale=wmatrix.scale[:features],
        encode=wmatrix.encode[:features],
    ).save(path)
    with pytest.raises(BadInput, match="without text"):
        attribute(path, *tiny_models, [], [], contexts={300: 2}, progress=False)


@pytest.fixture
def entry(wmatrix: WMatrix, tmp_path: Path) -> WMatrixEntry:
    path = tmp_path / "pair.wmatrix"
    wmatrix.save(path)
    return WMatrixEntry.read(path)


@pytest.fixture
def measured() -> Callable[[str], Degradation]:
    one = part(losses_of(COSTS, 0.4), np.array([0.1, 0.3]))
    both = Measures(nll=one, kl=one)

    def make(digest: str) -> Degradation:
        return Degradation(
            wmatrix=digest,
            contexts={300: Lost(all=both, kinds={"a": both})},
            texts="t" * 64,
            continuation=60,
            anchor_tokens=2000,
            rank=4,
            measured=datetime.date(2026, 11, 23),
            hardware="",
            versions={},
        )

    return make


def test_nobody_has_measured_it(entry: WMatrixEntry) -> None:
    assert load_for(entry) is None


def test_another_files_measurement_is_not_used(
    entry: WMatrixEntry,
    measured: Callable[[str], Degradation],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = measured(entry.digest)
    assert kept.save(entry.path) == beside(entry.path)
    assert beside(entry.path).name == "pair.wmatrix.degradation.json"
    assert load_for(entry) == kept
    measured("0" * 64).save(entry.path)
    with caplog.at_level(logging.WARNING):
        assert load_for(entry) is None
    assert "000000000000" in caplog.text


def test_an_unreadable_measurement_is_not_used(
    entry: WMatrixEntry, caplog: pytest.LogCaptureFixture
) -> None:
    beside(entry.path).write_text('{"wmatrix": 1}')
    with caplog.at_level(logging.WARNING):
        assert load_for(entry) is None
    assert "pair.wmatrix.degradation.json is not used" in caplog.text


def test_a_measurement_of_the_old_form_is_not_used(
    entry: WMatrixEntry,
    measured: Callable[[str], Degradation],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As they were when truths were given: what is attributed, and no shares of the whole."""
    kept = json.loads(measured(entry.digest).model_dump_json())
    del kept["rank"]
    for measure in kept["contexts"]["300"]["all"].values():
        for field in ("remainder", "served", "uncalibrated", "alone", "placed", "placed_shares"):
            del measure[field]
        measure["unattributed"] = {"mean": 0.1, "ci_low": 0.0, "ci_high": 0.2}
    beside(entry.path).write_text(json.dumps(kept))
    with caplog.at_level(logging.WARNING):
        assert load_for(entry) is None
    (said,) = caplog.messages
    assert said.startswith("pair.wmatrix.degradation.json is not used: it is not of this version's")
    assert "\n" not in said


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "degradation.py"
    spec = importlib.util.spec_from_file_location("benchmark_degradation", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_signs_and_the_remainder() -> None:
    found = part(losses_of(COSTS, 0.4), np.array([0.1, 0.3]))
    loss, *sources, rest, regression_, served = benchmark().part_lines(found)
    assert loss.split()[:3] == ["all", "constraints", "3.0000"]
    assert [line.split("share")[1].split("(")[0].strip() for line in sources] == [
        "-10%",
        "30%",
        "45%",
        "10%",
        "5%",
    ]
    assert "published 30%   with true positions -18%   alone  -0.3000" in sources[0]
    assert rest.startswith("  remainder ")
    assert rest.endswith("share  20% (20% … 20%)   with true positions  36%")
    assert regression_.split()[-4] == "0.4500"
    assert served.split()[3] == "0.2000"


@pytest.mark.slow
def test_a_plot_is_drawn(measured: Callable[[str], Degradation], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmark().plot(measured("0" * 64), "a → b", tmp_path / "figures" / "plot.png")
    assert (tmp_path / "figures" / "plot.png").stat().st_size > 1000
