"""Attribution of a pair's loss: the memories of all 32 maps, and the measurement as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution import attribution
from attribution.attribution import as_read, attribute, conditions, placed, said, with_norms
from attribution.constrained import ConstrainedMap
from attribution.shares import POSITIONS, SOURCES, Lifted, mask, subset

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.compatibility.degradation import load_for
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.conditions import EvalHarness, kl_divergence
from awareness_vllm.fit import gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.fit.reader import Reader
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import WMatrixEntry

# Tests of a benchmark's script.
pytestmark = [pytest.mark.unit, pytest.mark.nightly]


def test_true_norms_do_not_change_directions(wmatrix: WMatrix) -> None:
    geometry = wmatrix.manifest.target
    generator = torch.Generator().manual_seed(0)
    states, truth = torch.randn(2, 20, geometry.width, generator=generator)
    before = states.clone()
    result = with_norms(geometry, states, truth)
    # Every head of this target is 4 wide.
    ours, theirs, mapped = (s.view(20, -1, 4) for s in (result, truth, states))
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
    checkpoint = attribution.Checkpoint(tmp_path / "checkpoint", "")
    documents = (anchors[1:], anchors[:1])
    result, rows = attribution.fitted(reader, documents, 4, 1500, checkpoint, progress=False)
    assert rows >= 1500
    return EvalHarness(*tiny_models, wmatrix), reader, result


def test_true_states_lose_nothing_and_each_map_loses_another_amount(
    maps: tuple[EvalHarness, Reader, dict[Lifted, ConstrainedMap]], anchors: list[Document]
) -> None:
    harness, reader, result = maps
    wmatrix = harness.wmatrix
    assert wmatrix is not None
    context, follow = anchors[0].text[:200], [7, 20, 30, 40, 50]
    text = as_read(harness, wmatrix, context)
    assert text.ids == harness.ids(context)
    native = said(harness, harness.native(text.ids), follow)
    again = said(harness, placed(wmatrix, text.ids, text.truth), follow)
    torch.testing.assert_close(again, native, atol=1e-5, rtol=0)
    memories = list(conditions(wmatrix, text, reader.read(context), result))
    keys = [torch.cat([k.flatten() for k in memory.keys]) for memory in memories]
    values = [torch.cat([v.flatten() for v in memory.values]) for memory in memories]
    for number in range(32):
        for name in SOURCES:
            other = mask(subset(number) ^ {name})
            assert not torch.equal(keys[number], keys[other]), name
            # Positions are the keys' alone.
            assert torch.equal(values[number], values[other]) == (name == POSITIONS)
    losses = attribution.losses(harness, wmatrix, reader, result, context, follow)
    assert losses.shape == (33, 2)
    kl = kl_divergence(native, said(harness, text.served, follow)).mean().item()
    assert losses[0, 1] == pytest.approx(kl, abs=1e-6)
    assert len(set(losses[1:, 1].tolist())) == 32


def test_keys_have_the_positions_that_the_source_counted(
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


def test_an_attribution_is_complete_and_can_be_saved_and_loaded(
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
    result = attribute(
        path,
        *tiny_models,
        texts,
        anchors,
        contexts={40: 3, 20: 4},
        continuation=5,
        tokens=1500,
        folder=tmp_path / "checkpoint",
        progress=False,
    )
    assert read == [wmatrix.manifest.layers]
    assert not (tmp_path / "checkpoint").exists()
    assert list(result.contexts) == [20, 40]
    assert result.contexts[40].all.kl.n == 3
    lost = result.contexts[20]
    assert lost.all.nll.n == lost.all.kl.n == 4
    assert {kind: m.nll.n for kind, m in lost.kinds.items()} == {"a": 2, "b": 2}
    for measure in (lost.all.nll, lost.all.kl, lost.kinds["a"].kl):
        assert measure.recovered.keys() == measure.alone.keys() == SOURCES.keys()
        whole = sum(i.mean for i in measure.recovered.values()) + measure.remainder.mean
        assert measure.loss.mean == pytest.approx(whole)
    assert lost.all.kl.loss.mean > 0
    assert lost.all.kl.loss != lost.all.nll.loss
    assert result.anchor_tokens >= 1500
    assert result.rank == 4
    assert result.shares(10) == result.shares(20) == lost.all.nll.shares
    assert result.shares(21) == result.shares(99) == result.contexts[40].all.nll.shares
    assert result.shares(40, "kl") == result.contexts[40].all.kl.shares
    result.save(path)
    assert load_for(WMatrixEntry.read(path)) == result


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
