"""Attribution of a loss: every ablation gives the truth for its part, and for no other."""

from __future__ import annotations

import datetime
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.compatibility import attribution
from awareness_vllm.compatibility.ablations import (
    SOURCES,
    Aligned,
    bands,
    drifts,
    together,
    unmatched,
)
from awareness_vllm.compatibility.attribution import arms, attribute, placed, said
from awareness_vllm.compatibility.degradation import (
    Degradation,
    Lost,
    Measures,
    beside,
    load_for,
    part,
)
from awareness_vllm.compatibility.unreduced import outside, unreduced
from awareness_vllm.errors import BadInput
from awareness_vllm.wmatrix import gather
from awareness_vllm.wmatrix.bench import Bench, divergence, surprise
from awareness_vllm.wmatrix.config import FitConfig
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.fit import fit
from awareness_vllm.wmatrix.layers import columns
from awareness_vllm.wmatrix.reader import Reader
from awareness_vllm.wmatrix.shelf import WMatrixEntry
from awareness_vllm.wmatrix.statistics import Statistics

pytestmark = pytest.mark.unit

PUBLISHED = {
    "dimensional projection": 0.30,
    "head redistribution": 0.25,
    "positional re-encoding": 0.20,
    "layer depth mismatch": 0.15,
    "activation mismatch": 0.10,
}
PRIORS = {name: one.prior for name, one in SOURCES.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text(wmatrix: WMatrix) -> Aligned:
    """Twenty tokens whose states are mapped with some error."""
    geometry = wmatrix.manifest.target
    truth = random(20, geometry.width)
    return Aligned(
        geometry=geometry,
        mapped=truth + 0.5 * random(20, geometry.width, seed=1),
        truth=truth,
        beyond_rank=random(20, geometry.width, seed=2),
        drift=random(2, geometry.width, seed=3),
        unmatched=(1,),
    )


def test_the_registry_has_the_published_sources() -> None:
    assert PRIORS == PUBLISHED


def test_keys_are_given_and_values_are_not(text: Aligned) -> None:
    found = SOURCES["head redistribution"].ablate(text.mapped, text)
    half = text.geometry.key_width
    assert torch.equal(found[:, :half], text.truth[:, :half])
    assert torch.equal(found[:, half:], text.mapped[:, half:])


def test_unmatched_layers_are_given_and_others_are_not(text: Aligned) -> None:
    before = text.mapped.clone()
    found = SOURCES["layer depth mismatch"].ablate(text.mapped, text)
    for layer in range(3):
        part_of, whose = columns(text.geometry, layer), text.truth if layer == 1 else before
        assert torch.equal(found[:, part_of], whose[:, part_of])
    assert torch.equal(text.mapped, before)


def test_norms_are_given_and_directions_are_not(text: Aligned) -> None:
    before = text.mapped.clone()
    found = SOURCES["activation mismatch"].ablate(text.mapped, text)
    # Every head of this target is 4 wide.
    ours, theirs, mapped = (s.view(20, -1, 4) for s in (found, text.truth, text.mapped))
    torch.testing.assert_close(ours.norm(dim=2).mean(0), theirs.norm(dim=2).mean(0))
    cosines = torch.nn.functional.cosine_similarity(ours, mapped, dim=2)
    torch.testing.assert_close(cosines, torch.ones(20, 6))
    assert torch.equal(text.mapped, before)


def test_corrections_are_added_where_they_belong(text: Aligned) -> None:
    found = SOURCES["dimensional projection"].ablate(text.mapped, text)
    torch.testing.assert_close(found - text.mapped, text.beyond_rank)
    found = SOURCES["positional re-encoding"].ablate(text.mapped, text)
    torch.testing.assert_close((found - text.mapped)[:8], text.drift[:1].expand(8, -1))
    torch.testing.assert_close((found - text.mapped)[8:], text.drift[1:].expand(12, -1))


def test_given_together_truths_are_not_corrected_away(text: Aligned) -> None:
    found = together(text.mapped, text)
    half = text.geometry.key_width
    assert torch.equal(found[:, :half], text.truth[:, :half])
    part_of = columns(text.geometry, 1)
    assert torch.equal(found[:, part_of], text.truth[:, part_of])
    assert not torch.equal(found, text.truth)


def test_bands_double() -> None:
    assert bands(130).bincount().tolist() == [8, 16, 32, 64, 10]


def test_a_drift_with_the_position_is_found_in_the_other_texts() -> None:
    by_band = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    constant = torch.tensor([5.0, 7.0])
    errors = [by_band[bands(24)] + constant for _ in range(3)]
    # Of its own error a text must learn nothing.
    errors[2] = errors[2] + 100 * random(24, 2)
    mean = (by_band[0] * 8 + by_band[1] * 16) / 24
    torch.testing.assert_close(drifts(errors)[2], by_band - mean)


def test_what_is_the_same_everywhere_is_no_drift() -> None:
    for drift in drifts([torch.full((count, 3), 2.0) for count in (9, 20, 60)]):
        torch.testing.assert_close(drift, torch.zeros(4, 3))


def test_a_text_alone_has_no_drift() -> None:
    assert not drifts([random(20, 3)])[0].any()


@pytest.mark.parametrize(
    ("read", "source", "target", "found"),
    [
        (range(4), 4, 4, ()),
        (range(30), 30, 18, ()),
        (range(2), 2, 4, (1, 2)),
        ([3], 4, 3, (0, 1)),
        ([0, 2], 3, 3, (1,)),
    ],
    ids=["same depth", "deeper source", "half the depth", "last one read", "every other read"],
)
def test_layers_that_share_a_source_layer_are_unmatched(
    read: list[int], source: int, target: int, found: tuple[int, ...]
) -> None:
    assert unmatched(read, source, target) == found


def test_the_unreduced_solution_is_what_the_latent_cannot_express() -> None:
    x, mixing = random(4000, 6), random(6, 5, seed=1)
    y = 3 + (x @ mixing) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    statistics = Statistics.start(x, y)
    statistics.add(x, y)
    decode, weight = random(2, 5, seed=2), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    scale = statistics.y_scale
    full = outside(statistics, decode, weight, 1e-6)
    assert full.rows == 4000
    metric = weight / scale
    added = ((x - full.mean) * full.scale) @ full.solution
    # Nothing of it lies in the span, and with the best latent it makes the states whole.
    assert ((added * metric) @ (decode * metric).T).abs().max() < 1e-2
    rest = (y - y.mean(0) - added) * metric
    latent = torch.linalg.lstsq((decode * metric).T, rest.T).solution
    torch.testing.assert_close((decode * metric).T @ latent, rest.T, atol=0.03, rtol=0)
    assert rest.std() < ((y - y.mean(0)) * metric).std()


def figures(**recovered: list[float]) -> dict[str, np.ndarray]:
    return {name: 5 - np.array(nats) for name, nats in recovered.items()}


def test_shares_are_of_what_each_recovers_alone() -> None:
    native, memory = np.array([3.0, 3.5]), np.array([5.0, 5.0])
    ablated = figures(a=[0.3, 0.1], b=[0.5, 0.7], c=[0.1, -0.5])
    found = part(native, memory, ablated, np.array([4.0, 4.0]), {"a": 0.2, "b": 0.1, "c": 0.7})
    assert found.n == 2
    assert found.loss.mean == pytest.approx(1.75)
    assert found.recovered["a"].mean == pytest.approx(0.2)
    assert found.recovered["c"].mean == pytest.approx(-0.2)
    assert found.clamped == ("c",)
    assert found.unattributed.mean == pytest.approx(0.75)
    assert [share.source for share in found.shares] == ["c", "a", "b"]
    assert [share.share.mean for share in found.shares] == pytest.approx([0, 0.25, 0.75])
    assert sum(share.share.mean for share in found.shares) == pytest.approx(1)
    for share in found.shares:
        assert share.share.ci_low <= share.share.mean <= share.share.ci_high


def test_nothing_recovered_has_no_shares() -> None:
    native = np.array([5.0, 5.0])
    found = part(native, native, figures(a=[0.0, 0.0], b=[-1.0, 0.0]), native, {"a": 1, "b": 0})
    assert found.shares == ()


CONFIG = FitConfig(tokens=2000, rank=4, predecessors=1, calibration=0, held_out=0.0, ridge=0.02)


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


def test_all_of_the_truth_loses_nothing(
    tiny_models: tuple[Path, Path],
    fitted: tuple[WMatrix, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    wmatrix, _ = fitted
    bench = Bench(*tiny_models, wmatrix)
    reader = Reader(*tiny_models, wmatrix.manifest.predecessors)
    reader.choose(wmatrix.manifest.layers)
    full = unreduced(reader, wmatrix, anchors, 2000, progress=False)
    context = anchors[0].text[:200]
    text = attribution.aligned(bench, wmatrix, reader, full, context)
    ids, follow = bench.ids(context), [7, 20, 30, 40, 50]
    native = said(bench, bench.native(ids), follow)
    mapped = said(bench, bench.memory(bench.package(context)), follow)
    text = replace(text, drift=torch.zeros(9, text.truth.shape[1]))
    found = {arm: said(bench, placed(wmatrix, s, ids), follow) for arm, s in arms(text).items()}
    assert found.keys() == {"native", "memory", "together", *PUBLISHED}
    assert surprise(native, follow).mean().item() == pytest.approx(
        -native[range(4), follow[1:]].mean().item()
    )
    torch.testing.assert_close(found["native"], native, atol=1e-5, rtol=0)
    assert divergence(native, found["native"]).mean().item() == pytest.approx(0, abs=1e-6)
    # The map's own memory is rounded to bfloat16.
    torch.testing.assert_close(found["memory"], mapped, atol=1e-3, rtol=0)
    assert divergence(native, found["memory"]).mean().item() > 1e-5
    whole = replace(text, unmatched=(0, 1))
    given = SOURCES["layer depth mismatch"].ablate(whole.mapped, whole)
    given = said(bench, placed(wmatrix, given, ids), follow)
    torch.testing.assert_close(given, native, atol=1e-5, rtol=0)


def test_a_pair_is_measured_kept_and_found_again(
    tiny_models: tuple[Path, Path],
    fitted: tuple[WMatrix, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    _, path = fitted
    texts = [Document(f"{'ab'[i % 2]}/{i}", d.text) for i, d in enumerate(anchors)]
    found = attribute(
        path,
        *tiny_models,
        texts,
        anchors,
        contexts=(40, 20),
        continuation=5,
        limit=4,
        tokens=2000,
        progress=False,
    )
    assert list(found.contexts) == [20, 40]
    lost = found.contexts[20]
    assert lost.all.nll.n == lost.all.kl.n == 4
    assert {kind: m.nll.n for kind, m in lost.kinds.items()} == {"a": 2, "b": 2}
    assert lost.all.nll.recovered.keys() == lost.all.kl.recovered.keys() == PUBLISHED.keys()
    # Half of the source's layers are read, as many as the target has: no layer is unmatched.
    assert lost.all.kl.recovered["layer depth mismatch"].mean == 0
    assert lost.all.kl.loss.mean > lost.all.kl.unattributed.mean > 0
    assert lost.all.kl.loss != lost.all.nll.loss
    assert found.anchor_tokens >= 2000
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
        attribute(path, *tiny_models, [], [], progress=False)


@pytest.fixture
def entry(wmatrix: WMatrix, tmp_path: Path) -> WMatrixEntry:
    path = tmp_path / "pair.wmatrix"
    wmatrix.save(path)
    return WMatrixEntry.read(path)


@pytest.fixture
def measured() -> Callable[[str], Degradation]:
    native = np.array([3.0, 3.5])
    one = part(native, native + 1, {name: native + 0.5 for name in PRIORS}, native, PRIORS)
    both = Measures(nll=one, kl=one)

    def make(digest: str) -> Degradation:
        return Degradation(
            wmatrix=digest,
            contexts={300: Lost(all=both, kinds={"a": both})},
            texts="t" * 64,
            limit=16,
            continuation=60,
            anchor_tokens=2000,
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


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "degradation.py"
    spec = importlib.util.spec_from_file_location("benchmark_degradation", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_says_what_was_counted_as_nothing() -> None:
    native, memory = np.array([3.0, 3.5]), np.array([5.0, 5.0])
    ablated = figures(a=[0.3, 0.1], c=[0.1, -0.5])
    found = part(native, memory, ablated, native, {"a": 0.25, "c": 0.5})
    loss, a, c, rest = benchmark().part_lines(found)
    assert loss.split()[:3] == ["loss,", "nats", "1.7500"]
    assert a.startswith("  a ")
    assert "share 100% (75% … 100%), published 25%" in a
    assert "harm" not in a
    assert c.endswith("published 50% (harm, counted as 0)")
    assert rest.split()[:2] == ["unattributed", "0.0000"]


@pytest.mark.slow
def test_a_plot_is_drawn(measured: Callable[[str], Degradation], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmark().plot(measured("0" * 64), "a → b", tmp_path / "figures" / "plot.png")
    assert (tmp_path / "figures" / "plot.png").stat().st_size > 1000
