"""The sources of a loss: shares that add up, their file beside a W-Matrix, the printed table."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from attribution.shares import (
    HEADS,
    LAYERS,
    NORMS,
    POSITIONS,
    RANK,
    SOURCES,
    WMATRIX,
    mask,
    part,
    shapley,
    subset,
)
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.compatibility.degradation import Degradation, Lost, Measures, beside, load_for
from awareness_vllm.compatibility.report import REMAINDER
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import WMatrixEntry

pytestmark = pytest.mark.unit

PUBLISHED = {
    "dimensional projection": 0.30,
    "head redistribution": 0.25,
    "positional re-encoding": 0.20,
    "layer depth mismatch": 0.15,
    "activation mismatch": 0.10,
}
ALL = frozenset(SOURCES)


def test_the_sources_are_the_published_ones() -> None:
    assert SOURCES == PUBLISHED


def test_every_subset_has_its_number() -> None:
    assert [mask(subset(i)) for i in range(32)] == [*range(32)]
    assert subset(0) == frozenset()
    assert subset(31) == ALL
    assert {RANK, NORMS} == ALL - WMATRIX


@given(st.integers(1, 5).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 99))))
def test_shapley_values_add_up_to_the_loss(drawn: tuple[int, int]) -> None:
    count, seed = drawn
    losses = np.random.default_rng(seed).normal(size=(2**count, 3))
    result = shapley(losses)
    np.testing.assert_allclose(result.sum(0) + losses[-1], losses[0])
    # A constraint without effect gets 0, one that adds the same everywhere gets exactly that.
    with_one = np.concatenate((losses + 2, losses))
    np.testing.assert_allclose(shapley(with_one), [*result, [2, 2, 2]])


def test_two_that_only_work_together_share() -> None:
    result = shapley(np.array([[4.0], [4.0], [4.0], [1.0]]))
    np.testing.assert_allclose(result, [[1.5], [1.5]])


def losses_of(cost: dict[str, float], rest: float, n: int = 2) -> np.ndarray:
    """Losses [32, n] that add up, with a little more in each text."""
    bound = [rest + sum(c for name, c in cost.items() if name not in subset(i)) for i in range(32)]
    return np.array(bound)[:, None] * np.arange(1, n + 1)


COSTS = {RANK: -0.2, HEADS: 0.6, POSITIONS: 0.9, LAYERS: 0.2, NORMS: 0.1}


def test_shares_of_the_naive_loss_have_signs() -> None:
    result = part(losses_of(COSTS, 0.4), np.array([0.1, 0.3]))
    assert result.n == 2
    assert result.loss.mean == pytest.approx(3.0)
    assert {name: i.mean for name, i in result.recovered.items()} == pytest.approx(
        {name: 1.5 * cost for name, cost in COSTS.items()}
    )
    assert result.remainder.mean == pytest.approx(0.6)
    shares = {share.source: share.share.mean for share in result.shares}
    assert shares == pytest.approx({**{n: c / 2 for n, c in COSTS.items()}, REMAINDER: 0.2})
    assert sum(shares.values()) == pytest.approx(1)
    assert [share.prior for share in result.shares] == [*PUBLISHED.values(), None]
    assert result.served.mean == pytest.approx(0.2)
    # With true positions the others share what is left of the loss.
    assert result.placed.mean == pytest.approx(3.0 - 1.35)
    placed = {share.source: share.share.mean for share in result.placed_shares}
    others = {name: cost / 1.1 for name, cost in COSTS.items() if name != POSITIONS}
    assert placed == pytest.approx({**others, REMAINDER: 0.4 / 1.1})
    # At the W-Matrix's structure: limited rank, its own norms, nothing else.
    assert result.uncalibrated.mean == pytest.approx(1.5 * (0.4 - 0.2 + 0.1))
    assert {name: i.mean for name, i in result.alone.items()} == pytest.approx(
        {name: 1.5 * cost for name, cost in COSTS.items()}
    )


def test_alone_is_at_the_structure_of_the_wmatrix() -> None:
    losses = np.zeros((32, 2))
    losses[mask(WMATRIX)] = 1
    losses[mask(WMATRIX | {RANK})] = 0.25
    losses[mask(WMATRIX - {HEADS})] = 5
    result = part(losses, np.zeros(2)).alone
    assert result[RANK].mean == pytest.approx(0.75)
    assert result[HEADS].mean == pytest.approx(4)
    assert result[LAYERS].mean == pytest.approx(-1)


def test_nothing_lost_has_no_shares() -> None:
    assert part(np.zeros((32, 2)), np.zeros(2)).shares == ()


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


def test_without_a_measurement_there_is_none(entry: WMatrixEntry) -> None:
    assert load_for(entry) is None


def test_another_files_measurement_is_not_used(
    entry: WMatrixEntry,
    measured: Callable[[str], Degradation],
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = measured(entry.digest)
    assert saved.save(entry.path) == beside(entry.path)
    assert beside(entry.path).name == "pair.wmatrix.degradation.json"
    assert load_for(entry) == saved
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
    """An older format: an unattributed part, and no shares of the whole."""
    saved = json.loads(measured(entry.digest).model_dump_json())
    del saved["rank"]
    for measure in saved["contexts"]["300"]["all"].values():
        for field in ("remainder", "served", "uncalibrated", "alone", "placed", "placed_shares"):
            del measure[field]
        measure["unattributed"] = {"mean": 0.1, "ci_low": 0.0, "ci_high": 0.2}
    beside(entry.path).write_text(json.dumps(saved))
    with caplog.at_level(logging.WARNING):
        assert load_for(entry) is None
    (message,) = caplog.messages
    assert message.startswith(
        "pair.wmatrix.degradation.json is not used: it is not of this version's"
    )
    assert "\n" not in message


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "degradation.py"
    spec = importlib.util.spec_from_file_location("benchmark_degradation", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_signs_and_the_remainder() -> None:
    result = part(losses_of(COSTS, 0.4), np.array([0.1, 0.3]))
    loss, *sources, rest, regression_, served = benchmark().part_lines(result)
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
