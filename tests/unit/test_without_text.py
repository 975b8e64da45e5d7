"""Packages without text: their own map reads the source's states alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awareness_vllm.align.realign import copy, realign
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput, UnsupportedRequest
from awareness_vllm.evaluate import certify as certify_module
from awareness_vllm.evaluate.arms import PlanShape
from awareness_vllm.evaluate.certify import certify
from awareness_vllm.evaluate.evaluate import CaseFigures, TextFigures
from awareness_vllm.fit import fit, gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.hf import states
from awareness_vllm.models.rope import unrotate
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, publish, read, verify, without_text
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.features import flat_states
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit

CONFIG = FitConfig(tokens=1000, rank=4, predecessors=None, calibration=4, held_out=0.3)


@pytest.fixture(scope="module")
def package(make_package: Callable[..., Package]) -> Package:
    return make_package("nobody needs to know")


@pytest.fixture(scope="module")
def stripped(package: Package) -> Package:
    return without_text(package)


@pytest.fixture(scope="module")
def states_only(wmatrix: WMatrix) -> WMatrix:
    width = wmatrix.manifest.source_width
    return replace(
        wmatrix,
        manifest=wmatrix.manifest.model_copy(update={"predecessors": None}),
        mean=wmatrix.mean[:width],
        scale=wmatrix.scale[:width],
        encode=wmatrix.encode[:width],
    )


def no_embedding(ids: Tensor) -> Tensor:
    raise AssertionError("no token is to be looked up")


def test_nothing_of_the_text_is_left(package: Package, stripped: Package, tmp_path: Path) -> None:
    raw = publish(stripped, tmp_path).read_bytes()
    assert package.text.encode() not in raw
    captured = verify(next(tmp_path.iterdir()))
    assert (captured.text, set(captured.tokens), captured.spans.any()) == ("", {0}, False)
    assert not captured.manifest.has_text
    for one, other in zip(copy(captured).keys, copy(package).keys, strict=True):
        assert torch.equal(one, other)


def test_each_source_token_but_the_first_becomes_one_of_the_targets(
    stripped: Package, states_only: WMatrix, tmp_path: Path
) -> None:
    memory = realign(stripped, states_only, tmp_path, no_embedding, dtype=torch.float32)
    manifest, count = states_only.manifest, stripped.manifest.tokens
    sink = len(manifest.sink)
    assert len(memory.ids) == sink + count - 1
    flat = flat_states(stripped.geometry, stripped.keys, stripped.values)[1:]
    keys, values = states_only.map(flat, torch.empty(count - 1, 0))
    positions = torch.arange(sink, sink + count - 1)
    for i, layer in enumerate(manifest.target.layers):
        torch.testing.assert_close(
            unrotate(memory.keys[i][sink:], positions, layer.positions), keys[i]
        )
        torch.testing.assert_close(memory.values[i][sink:], values[i])


def test_such_a_map_ignores_the_text(
    package: Package, stripped: Package, states_only: WMatrix, tmp_path: Path
) -> None:
    one, other = (
        realign(p, states_only, tmp_path, no_embedding, dtype=torch.float32)
        for p in (package, stripped)
    )
    assert one.ids == other.ids
    assert all(torch.equal(a, b) for a, b in zip(one.keys, other.keys, strict=True))


def test_a_map_that_reads_tokens_refuses_such_a_package(
    stripped: Package, wmatrix: WMatrix, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="--without-text"):
        realign(stripped, wmatrix, tmp_path, no_embedding, dtype=torch.float32)


def test_a_row_stands_where_the_source_token_ends(tiny_models: tuple[Path, Path]) -> None:
    reader = Reader(*tiny_models, predecessors=None)
    text = "naïve words, and 🦊 more of them"
    row = reader.read(text)
    package = capture(tiny_models[0], text)
    assert len(row.positions) == package.manifest.tokens - 1
    assert row.features.shape == (len(row.positions), reader.width)
    assert (row.positions.diff() >= 0).all()
    assert row.positions[-1] == len(row.ids) - len(reader.sink) - 1
    target, source = (
        tokenize(load_tokenizer(str(model)), text).spans[:, 1] for model in tiny_models[::-1]
    )
    # Of the target's tokens, the one that holds the last byte: no earlier one reaches it.
    for place, end in zip(row.positions.tolist(), source[1:], strict=True):
        assert target[place] >= end
        assert place == 0 or target[place - 1] < end
    x, y = reader.pairs([reader.tokeniser.text(text)])
    assert torch.equal(x, row.features)
    truth = flat_states(reader.target_geometry, *states(reader.target_model, row.ids))
    torch.testing.assert_close(y, truth[len(reader.sink) :][row.positions])


@pytest.fixture(scope="module")
def fitted(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        wmatrix = fit.fit(*tiny_models, anchors, CONFIG, progress=False)
    path = tmp_path_factory.mktemp("map") / "states.wmatrix"
    wmatrix.save(path)
    return path


@pytest.mark.slow
def test_it_is_fitted_and_certified_like_any_other(
    fitted: Path,
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wmatrix = load(fitted)
    assert not wmatrix.manifest.reads_tokens
    assert len(wmatrix.encode) == wmatrix.manifest.source_width

    def recalled(
        harness: object, cases: object, *, shapes: object, controls: object, **kwargs: object
    ) -> CaseFigures:
        assert (shapes, controls) == ([PlanShape()], ())
        conditions = ("native", "memory", "tokens_only", "wrong_memory", "none")
        ones = torch.ones(2, 2).numpy()
        return CaseFigures({arm: ones for arm in conditions}, ["fact"] * 2, [0, 0])

    monkeypatch.setattr(certify_module, "evaluate_cases", recalled)  # no random model recalls
    # Nor does it read: what it keeps of almost nothing can be any number.
    kept = {"mean": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    monkeypatch.setattr(TextFigures, "retention", lambda *args: kept)
    measured = certify(wmatrix, *tiny_models, anchors, [], limit=3, context=90, continuation=8)
    result = Certificate.model_validate(measured.manifest.certificate)
    assert [(plan.tail, plan.margin) for plan in result.plans] == [(0, None)]
    assert result.metrics is None


def test_a_server_refuses_it_for_now(
    fitted: Path, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    package = without_text(capture(tiny_models[0], "some words or others"))
    path = publish(package, tmp_path)
    config = ServingConfig(store=str(tmp_path), wmatrices=(str(fitted),))
    model = ServedModel.read(tiny_models[1], 1000)
    with pytest.raises(UnsupportedRequest, match="has no text"):
        MemoryResolver.from_config(config, model).resolve_one(path.stem, "")


def test_the_command_leaves_the_text_out(
    tiny_models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some words or others")
    arguments = ["--model", str(tiny_models[0]), "--text", str(tmp_path / "a.txt")]
    store = ["--store", str(tmp_path / "store"), "--without-text", "--json"]
    assert main(["capture", *arguments, *store]) == 0
    assert not read(Path(json.loads(capsys.readouterr().out)["path"])).manifest.has_text
